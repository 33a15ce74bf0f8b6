"""Measures how a model's answer changes when single visual tokens, or blocks of them, are left out of the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qapbench.errors import UserError
from qapbench.models import family_of
from qapbench.models.layers import has_linear_attention
from qapbench.prune.prompt import unpruned

if TYPE_CHECKING:
    from transformers import DynamicCache

TOLERANCE = 1e-2  # allowed difference to a logit of the model's own forward pass, relative to its largest logit or to 1


@dataclass(frozen=True)
class OcclusionEffect:
    """The effect of leaving out each of U units, every field a tensor [U]; all but `changed` are float64.

    Attributes:
        answer: KL(p_all || p_without) in nats, where p is the quantized model's distribution over the options.
        full: the same for the model in full precision.
        error: growth of the quantization error in the tokens that stay. The error is ||h_q - h||_F / ||h||_F of their
            hidden states, mean over layers; its value with the unit present is subtracted from that without it.
        changed: bool, True if the quantized model then chooses another option.
    """

    answer: Tensor
    full: Tensor
    error: Tensor
    changed: Tensor


class Spliced:
    """Runs a model on embeddings, with the visual tokens of its own tower and projector already in place.

    `start` takes up a prompt; `without` then runs it with tokens left out.

    Attributes:
        view: the image's tokens.
        columns: [N] columns of the prompt at which these tokens stand.
        positions: position ids that are more than a count (M-RoPE); None if the model numbers its tokens.
        embeds: [1, L, D] embeddings of the whole prompt.
        cache: keys and values of the whole prompt.
        logits: [1, V] logits of the next token after the whole prompt.
        states: hidden states [1, L, D] after each layer.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.family = family_of(model)
        self.language = self.family.parts["language"]
        self.head = model.get_output_embeddings()

    def start(self, inputs: dict[str, Any]) -> None:
        """Run a prompt [1, L] with one image as a whole, and keep its embeddings, keys, values and hidden states.

        Args:
            inputs: the model's keyword arguments for the prompt.
        """
        ids = inputs["input_ids"]
        if has_linear_attention(self.model.config):
            kind = self.model.config.model_type
            raise UserError(
                f"model: tokens of a {kind} cannot be left out one by one: its layers with linear attention keep no "
                "keys of single tokens"
            )
        encoded = self.family.seen_images(inputs, frozenset())
        prompt = unpruned(inputs, encoded, self.family)
        placeholders = (ids[0] == self.family.image_token).nonzero()[:, 0]
        self.view = encoded.single
        self.columns = placeholders[encoded.views[0].places[0]]
        self.positions = prompt.inputs.get("position_ids")
        embeds = self.model.get_input_embeddings()(ids).clone()
        if prompt.features[0].shape[-1] != embeds.shape[-1]:
            kind = self.model.config.model_type
            raise UserError(
                f"model: tokens of a {kind} cannot be left out one by one: its decoder gets more of an image than the "
                "embeddings"
            )
        embeds[0, placeholders] = prompt.features[0].to(embeds.dtype)
        self.restart(embeds)

    def restart(self, embeds: Tensor) -> None:
        """Run the prompt that was started with other embeddings.

        Args:
            embeds: [1, L, D].
        """
        self.embeds = embeds
        self.cache = _empty_cache()
        self.logits, self.states = self._run(embeds, self.cache, self._numbered(0, embeds.shape[1]))

    def check(self, inputs: dict[str, Any]) -> None:
        """Compare with the model's own forward pass on the prompt that was started.

        Raises:
            UserError: the logits differ by more than TOLERANCE.
        """
        own = self.model(**inputs, logits_to_keep=1).logits[0, -1].float()
        spread = (own - self.logits[0].float()).abs().max()
        if not spread <= TOLERANCE * max(1.0, float(own.abs().max())):
            raise UserError(
                f"model: tokens of a {self.model.config.model_type} cannot be left out one by one: given embeddings "
                f"it answers otherwise (by {spread:.2g})"
            )

    def without(self, units: Sequence[Tensor], start: int) -> tuple[Tensor, list[Tensor]]:
        """Run the prompt with a unit left out, for several units in one batch.

        Columns before `start` are not computed again: their keys and values come from the run of the whole prompt.

        Args:
            units: for each of the C rows of the batch, the columns to leave out; equally many in each row, none before
                `start`.
            start: first column to compute.

        Returns:
            Logits of the next token [C, V], and the hidden states after each layer [C, L - start - unit, D].
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
                held: Any = layer  # its annotation allows any layer; those of a DynamicCache have keys and values
                kept = [t[:, :, :start].expand(len(units), -1, -1, -1) for t in (held.keys, held.values)]
                cache.update(kept[0], kept[1], index)
        if self.positions is None:
            return self._run(rest, cache, self._numbered(start, rest.shape[1]))
        # Positions that are more than a count (M-RoPE) are those that the tokens have in the whole prompt.
        given = self.positions[..., 0, start:]
        return self._run(rest, cache, torch.stack([given[..., row] for row in stays], dim=-2))

    def _numbered(self, start: int, width: int) -> Tensor:
        """Positions of the columns from `start` to `start + width`."""
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
    """The units to leave out, each a tensor of token indices, ordered by their first token.

    Args:
        count: number of tokens.
        grid: (height, width) of the tokens; None if they form no grid.
        block: side of a square unit in tokens; units at the right and bottom edge may be smaller. 1 makes every token a
            unit.

    Returns:
        Tensors of up to block * block token indices.

    Raises:
        UserError: blocks were asked for, and the tokens form no grid.
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
    """Measure the effect of each unit on a prompt that both models have started.

    Args:
        quantized: the quantized model.
        full: the same model in full precision.
        units: tokens of each unit, as indices into the image in raster order.
        options: token ids of the answers.
        batch_size: number of units in one forward pass. No result depends on it.
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
    """Batches of indices of units, each of neighbours with equal size.

    Columns before the first unit of a batch are not computed again, so neighbours share most of that saving.
    """
    by_width: dict[int, list[int]] = {}
    for index in sorted(range(len(units)), key=lambda i: int(columns[units[i]].min())):
        by_width.setdefault(len(units[index]), []).append(index)
    for members in by_width.values():
        yield from (members[at : at + size] for at in range(0, len(members), size))


def _distribution(logits: Tensor, options: Sequence[int]) -> Tensor:
    """Log-probabilities of the options: logits [C, V] -> [C, options] float64."""
    return logits[:, list(options)].double().log_softmax(dim=-1)


def _divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) in nats: [C], from log-probabilities [1, O] and [C, O]."""
    return (before.exp() * (before - after)).sum(dim=-1).clamp(min=0)


def _error_terms(quantized: Sequence[Tensor], full: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Squared norms of hidden states and of their quantization error, by layer and token.

    Returns:
        Two float64 tensors [layers, C, L]; [layers, L] if the batch has one row.
    """
    size = torch.stack([h.double().square().sum(dim=-1) for h in full])
    wrong = torch.stack([(q.double() - h.double()).square().sum(dim=-1) for q, h in zip(quantized, full, strict=True)])
    return (size[:, 0], wrong[:, 0]) if size.shape[1] == 1 else (size, wrong)


def _growth(size: Tensor, wrong: Tensor, gone: Sequence[Tensor], start: int, without: tuple[Tensor, Tensor]) -> Tensor:
    """Growth [C] of the relative error in the tokens that stay, mean over layers.

    Args:
        size: [layers, L] squared norms of the states with every token present.
        wrong: [layers, L] squared norms of their error.
        gone: columns that each row leaves out.
        start: first column that was computed again.
        without: the same two terms for the columns from `start` on, with the unit left out.
    """
    there = torch.ones(len(gone), size.shape[-1], dtype=torch.float64, device=size.device)
    for row, unit in zip(there, gone, strict=True):
        row[unit] = 0
    before = ((wrong @ there.T) / (size @ there.T)).sqrt().mean(dim=0)
    rest_size, rest_wrong = (term.view(size.shape[0], len(gone), -1).sum(dim=-1) for term in without)
    front_size, front_wrong = (term[:, :start].sum(dim=1, keepdim=True) for term in (size, wrong))
    after = ((front_wrong + rest_wrong) / (front_size + rest_size)).sqrt().mean(dim=0)
    return after - before
