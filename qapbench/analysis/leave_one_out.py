"""What happens to a model's answer when a visual token is left out: every token of an image, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qapbench.errors import UserError
from qapbench.models import family_of
from qapbench.prune.prompt import unpruned

if TYPE_CHECKING:
    from transformers import DynamicCache

TOLERANCE = 1e-2  # of a logit, between the model's own forward pass and the spliced one


@dataclass(frozen=True)
class OcclusionEffect:
    """What leaving out each of U units does, each [U], float64.

    Attributes:
        answer: KL(p_all || p_without) in nats of the quantized model's distribution over the options.
        full: the same of the model in full precision.
        error: by how much the quantization error of the tokens that stay grows: the relative error
            ||h_q - h||_F / ||h||_F of their hidden states, mean over layers, without the unit minus with it.
        changed: whether the quantized model then answers with another option.
    """

    answer: Tensor
    full: Tensor
    error: Tensor
    changed: Tensor


class Spliced:
    """A model that is given embeddings, with the visual tokens as they come out of its own tower and projector."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.family = family_of(model)
        self.language = self.family.parts["language"]
        self.head = model.get_output_embeddings()

    def start(self, inputs: dict[str, Any]) -> None:
        """Take up one prompt [1, L] with one image: embed it and run it whole, keeping keys, values and states."""
        ids = inputs["input_ids"]
        encoded = self.family.encode_images(inputs, frozenset())
        prompt = unpruned(inputs, encoded, self.family)
        placeholders = (ids[0] == self.family.image_token).nonzero()[:, 0]
        self.view = encoded.single
        self.columns = placeholders[encoded.views[0].places[0]]
        self.positions = prompt.inputs.get("position_ids")
        embeds = self.model.get_input_embeddings()(ids).clone()
        embeds[0, placeholders] = prompt.features[0].to(embeds.dtype)
        self.embeds = embeds
        self.cache = _empty_cache()
        self.logits, self.states = self._run(embeds, self.cache, self._numbered(0, embeds.shape[1]))

    def check(self, inputs: dict[str, Any]) -> None:
        """Raise UserError where the model's own forward pass on the prompt gives other logits."""
        own = self.model(**inputs, logits_to_keep=1).logits[0, -1].float()
        spread = (own - self.logits[0].float()).abs().max()
        if not spread <= TOLERANCE * max(1.0, float(own.abs().max())):
            raise UserError(
                f"model: tokens of a {self.model.config.model_type} cannot be left out one by one: given embeddings "
                f"it answers otherwise (by {spread:.2g})"
            )

    def without(self, units: Sequence[Tensor], start: int) -> tuple[Tensor, list[Tensor]]:
        """Leave each unit out, all in one batch; what comes before column `start` is taken from the whole run.

        Args:
            units: for each row of the batch the columns to leave out, equally many, none before `start`.

        Returns:
            Logits of the next token [C, V], and the hidden states of each layer [C, L - start - unit, D].
        """
        length = self.embeds.shape[1]
        stays = torch.ones(len(units), length - start, dtype=torch.bool, device=self.embeds.device)
        for row, unit in zip(stays, units, strict=True):
            row[unit - start] = False
        width = self.embeds.shape[-1]
        rest = self.embeds[:, start:].expand(len(units), -1, -1)[stays].view(len(units), -1, width)
        cache = _empty_cache()
        if start:
            for index, layer in enumerate(self.cache.layers):
                held: Any = layer  # annotated as any kind of layer; a DynamicCache holds keys and values
                kept = [t[:, :, :start].expand(len(units), -1, -1, -1) for t in (held.keys, held.values)]
                cache.update(kept[0], kept[1], index)
        if self.positions is None:
            return self._run(rest, cache, self._numbered(start, rest.shape[1]))
        # Positions that are more than a count stay what they are.
        given = self.positions[..., 0, start:]
        return self._run(rest, cache, torch.stack([given[..., row] for row in stays], dim=-2))

    def _numbered(self, start: int, width: int) -> Tensor:
        if self.positions is not None:
            return self.positions[..., start : start + width]
        return torch.arange(start, start + width, device=self.embeds.device).unsqueeze(0)

    def _run(self, embeds: Tensor, cache: DynamicCache, positions: Tensor) -> tuple[Tensor, list[Tensor]]:
        out = self.language(
            inputs_embeds=embeds,
            past_key_values=cache,
            position_ids=positions,
            use_cache=True,
            output_hidden_states=True,
        )
        return self.head(out.last_hidden_state[:, -1]), list(out.hidden_states[1:])


def _empty_cache() -> DynamicCache:
    from transformers import DynamicCache

    return DynamicCache()


def units_of(count: int, grid: tuple[int, int] | None, block: int) -> list[Tensor]:
    """The tokens [block * block] of each unit, in the order of their first; at the edge a unit may be smaller.

    Raises:
        UserError: blocks need a grid.
    """
    if block == 1:
        return list(torch.arange(count).unsqueeze(1))
    if grid is None:
        raise UserError("--block: this model's tokens lie on no grid; leave out one at a time")
    height, width = grid
    places = torch.arange(count).view(height, width)
    return [
        places[top : top + block, left : left + block].flatten()
        for top in range(0, height, block)
        for left in range(0, width, block)
    ]


def occlusion_effects(
    quantized: Spliced,
    full: Spliced,
    inputs: dict[str, Any],
    units: Sequence[Tensor],
    options: Sequence[int],
    batch_size: int,
) -> OcclusionEffect:
    """Leave every unit out of the prompt that both models have started.

    Args:
        units: of tokens (raster positions in the image); options: token ids of the answers.
        batch_size: units in one forward pass; no result depends on it.
    """
    columns = quantized.columns.cpu()
    whole = [_distribution(model.logits, options) for model in (quantized, full)]
    size, wrong = _error_terms(quantized.states, full.states)  # [layers, L]
    found: dict[str, list[Tensor]] = {"answer": [], "full": [], "error": [], "changed": []}
    order: list[int] = []
    for members in _chunks(units, columns, batch_size):
        order += members
        gone = [columns[units[i]].to(quantized.embeds.device) for i in members]
        start = min(int(unit.min()) for unit in gone)
        logits, states = quantized.without(gone, start)
        logits_full, states_full = full.without(gone, start)
        now = _distribution(logits, options)
        found["answer"].append(_divergence(whole[0], now))
        found["full"].append(_divergence(whole[1], _distribution(logits_full, options)))
        found["changed"].append(now.argmax(dim=-1) != whole[0].argmax(dim=-1))
        found["error"].append(_growth(size, wrong, gone, start, _error_terms(states, states_full)))
    place = torch.argsort(torch.tensor(order))
    return OcclusionEffect(**{name: torch.cat(parts)[place].cpu() for name, parts in found.items()})


def _chunks(units: Sequence[Tensor], columns: Tensor, size: int) -> Iterator[list[int]]:
    """Neighbouring units of one width: the longer the part before the first of them, the less is computed."""
    by_width: dict[int, list[int]] = {}
    for index in sorted(range(len(units)), key=lambda i: int(columns[units[i]].min())):
        by_width.setdefault(len(units[index]), []).append(index)
    for members in by_width.values():
        yield from (members[at : at + size] for at in range(0, len(members), size))


def _distribution(logits: Tensor, options: Sequence[int]) -> Tensor:
    """[C, V] -> [C, options], log-probabilities, float64."""
    return logits[:, list(options)].double().log_softmax(dim=-1)


def _divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) in nats of log-probabilities [1, O] and [C, O]."""
    return (before.exp() * (before - after)).sum(dim=-1).clamp(min=0)


def _error_terms(quantized: Sequence[Tensor], full: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Squared norms of the states and of their error, by layer and token: [layers, (C,) L] float64 each."""
    size = torch.stack([h.double().square().sum(dim=-1) for h in full])
    wrong = torch.stack([(q.double() - h.double()).square().sum(dim=-1) for q, h in zip(quantized, full, strict=True)])
    return (size[:, 0], wrong[:, 0]) if size.shape[1] == 1 else (size, wrong)


def _growth(size: Tensor, wrong: Tensor, gone: Sequence[Tensor], start: int, without: tuple[Tensor, Tensor]) -> Tensor:
    """[C]: relative error of the tokens that stay, mean over layers, with the unit gone minus with it there."""
    there = torch.ones(len(gone), size.shape[-1], dtype=torch.float64, device=size.device)
    for row, unit in zip(there, gone, strict=True):
        row[unit] = 0
    before = ((wrong @ there.T) / (size @ there.T)).sqrt().mean(dim=0)
    rest_size, rest_wrong = (term.view(size.shape[0], len(gone), -1).sum(dim=-1) for term in without)
    front_size, front_wrong = (term[:, :start].sum(dim=1, keepdim=True) for term in (size, wrong))
    after = ((front_wrong + rest_wrong) / (front_size + rest_size)).sqrt().mean(dim=0)
    return after - before
