"""Pruning around a model's own `forward` and `generate`: see, select, shorten the prompt, hand over."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import UserError
from .models import Family
from .models.relevance import QuestionReader
from .receipt import Receipt
from .spec import PruneSpec
from .strategy import Metric, Pruner, fusions
from .tokens import Selection, VisionTokens

IGNORED_LABEL = -100  # what Hugging Face's loss skips


@dataclasses.dataclass
class PrunedCalls:
    """Wraps the two entry points of a model.

    A prompt with N placeholders an image becomes an ordinary prompt with `keep` of them, and the kept features go
    in by the model's own door. Caches, masks and decoding then need no change.
    """

    family: Family
    spec: PruneSpec
    pruner: Pruner
    sensitivity: Metric | None
    reader: QuestionReader
    receipt: Receipt
    processor: Any = None

    def __post_init__(self) -> None:
        fusion = self.spec.fusion
        self.fusion = fusions.create(fusion.name, **fusion.params) if fusion else None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Shadow `forward` and `generate` on the instance; deleting the shadows restores the class's own."""
        model = self.family.model
        held = {name: model.__dict__[name] for name in ("forward", "generate") if name in model.__dict__}
        model.forward = self._wrap_forward(model.forward)
        model.generate = self._wrap_generate(model.generate)
        try:
            yield
        finally:
            for name in ("forward", "generate"):
                if name in held:
                    setattr(model, name, held[name])
                else:
                    delattr(model, name)

    def _wrap_forward(self, forward: Any) -> Any:
        signature = inspect.signature(forward)

        @functools.wraps(forward)
        def pruned(*args: Any, relevance_text: list[str] | None = None, **kwargs: Any) -> Any:
            if args:
                kwargs = {**dict(zip(signature.parameters, args, strict=False)), **kwargs}
            if kwargs.get(self.family.image_input) is not None:
                kwargs = self.shorten(kwargs, relevance_text)
            return forward(**kwargs)

        return pruned

    def _wrap_generate(self, generate: Any) -> Any:
        @functools.wraps(generate)
        def pruned(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            relevance_text = kwargs.pop("relevance_text", None)
            if inputs is not None:
                kwargs["input_ids"] = inputs
            if kwargs.get(self.family.image_input) is None:
                return generate(None, *args, **kwargs)
            prompt = kwargs["input_ids"]
            short = self.shorten(kwargs, relevance_text)
            removed = prompt.shape[1] - short["input_ids"].shape[1]
            if short.get("max_length") is not None:  # counts the prompt, which got shorter
                short["max_length"] -= removed
            output = generate(None, *args, **short)
            return _with_prompt(output, prompt, short["input_ids"].shape[1])

        return pruned

    def shorten(self, kwargs: dict[str, Any], relevance_text: list[str] | None = None) -> dict[str, Any]:
        """The call's keywords with pruned placeholders gone and chosen features in place of pixels."""
        kwargs = dict(kwargs)
        ids = kwargs.get("input_ids")
        if ids is None or kwargs.get("inputs_embeds") is not None:
            raise UserError("pruning needs input_ids with image placeholders; inputs_embeds cannot be pruned")
        if kwargs.get("past_key_values") is not None:
            raise UserError("pruning starts at the prompt: call without past_key_values")
        pixels = kwargs.pop(self.family.image_input)
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        placeholders = ids == self.family.image_token
        needs = (self.pruner.needs & self.family.offers) | self.reader.visual
        tokens = self.family.see(pixels, needs)
        owners = self._owners(placeholders, tokens)
        selection = self._select(tokens, ids, mask, placeholders, owners, relevance_text)
        features = self._features(tokens, selection)
        merged = selection.budget - selection.indices.shape[1]
        for feature in features:
            self.receipt.saw_image(tokens.count, feature.shape[0] - merged, merged)
        self.receipt.latest = selection
        kept = self._kept_columns(placeholders, selection, tokens.count)
        return {**self._cut(kwargs, ids, mask, kept), **self.family.encoded(features)}

    def _owners(self, placeholders: Tensor, tokens: VisionTokens) -> list[int]:
        """The row of the batch that each image belongs to."""
        per_row = placeholders.sum(dim=1).div(tokens.count, rounding_mode="floor")
        if placeholders.sum() % tokens.count or int(per_row.sum()) != tokens.batch:
            raise UserError(
                f"input_ids hold {int(placeholders.sum())} image placeholders, but {tokens.batch} image(s) "
                f"of {tokens.count} tokens were given"
            )
        return torch.arange(len(per_row)).repeat_interleave(per_row.cpu()).tolist()

    def _select(
        self, tokens: VisionTokens, ids: Tensor, mask: Tensor, placeholders: Tensor, owners: list[int],
        relevance_text: list[str] | None,
    ) -> Selection:  # fmt: skip
        if not self.reader.needs:
            return self._choose(tokens)
        if relevance_text is not None and len(relevance_text) != tokens.batch:
            raise UserError(f"relevance_text: {len(relevance_text)} texts for {tokens.batch} images")
        images = []
        for index, row in enumerate(owners):
            prompt = ids[row][mask[row].bool() & ~placeholders[row]]
            text = relevance_text[index] if relevance_text else self._decode(prompt)
            image = tokens[index]
            asked: dict[str, Any] = self.reader.fields(image, text, prompt)
            images.append(dataclasses.replace(image, **asked))
        return Selection.stack([self._choose(image) for image in images])

    def _choose(self, tokens: VisionTokens) -> Selection:
        sensitivity = self.sensitivity(tokens.projected) if self.sensitivity else None
        return self.pruner.select(tokens, self.spec.keep, sensitivity, self.fusion)

    def _decode(self, prompt: Tensor) -> str | None:
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        return None if tokenizer is None else tokenizer.decode(prompt, skip_special_tokens=True)

    def _features(self, tokens: VisionTokens, selection: Selection) -> list[Tensor]:
        """What the language model gets for each image: [K + M, D], merged tokens at their place."""
        width = tokens.projected.shape[-1]
        if selection.updated is not None:
            chosen = self._in_language_space(tokens, selection, selection.updated)
        else:
            chosen = tokens.projected.gather(1, selection.indices.unsqueeze(-1).expand(-1, -1, width))
        if selection.merged is not None:
            merged = self._in_language_space(tokens, selection, selection.merged)
            front, back = merged[:, : selection.front], merged[:, selection.front :]
            chosen = torch.cat([front, chosen, back], dim=1)
        return list(chosen)

    def _in_language_space(self, tokens: VisionTokens, selection: Selection, made: Tensor) -> Tensor:
        if selection.space == "patches":
            made = self.family.project(made.to(tokens.require("patches", "merging").dtype))
        return made.to(tokens.projected.dtype)

    def _kept_columns(self, placeholders: Tensor, selection: Selection, count: int) -> Tensor:
        """[B, L] bool: the columns of the prompt that stay."""
        if self.spec.positions == "keep" and selection.merged is not None:
            raise UserError(
                f"prune.positions: 'keep' has no place for the tokens that {self.spec.method} merges; use 'compact'"
            )
        if selection.merged is None:
            stays = selection.mask(count)
        else:  # merged tokens have no raster place: the first placeholders serve
            stays = (
                torch.arange(count, device=placeholders.device).expand(len(selection.indices), -1) < selection.budget
            )
        kept = ~placeholders
        kept[placeholders] = stays.flatten().to(kept.device)
        return kept

    def _cut(self, kwargs: dict[str, Any], ids: Tensor, mask: Tensor, kept: Tensor) -> dict[str, Any]:
        """Every per-token input with the dropped columns gone, padded again on the side that was padded."""
        left = bool(mask[:, -1].all())
        positions = kwargs.get("position_ids")
        if positions is None or self.spec.positions == "compact":
            counted = mask if self.spec.positions == "keep" else mask * kept
            positions = (counted.cumsum(dim=-1) - 1).clamp(min=0)
        pad = self.family.model.config.get_text_config().pad_token_id or 0
        cut = {
            "input_ids": _gather(ids, kept, pad, left),
            "attention_mask": _gather(mask, kept, 0, left),
            "position_ids": _gather(positions, kept, 0, left),
        }
        if kwargs.get("labels") is not None:
            cut["labels"] = _gather(kwargs["labels"], kept, IGNORED_LABEL, left)
        return {**kwargs, **cut}


def _gather(values: Tensor, kept: Tensor, fill: int, left: bool) -> Tensor:
    """[B, L] -> [B, longest], the kept columns of each row in order."""
    rows = [row[stay] for row, stay in zip(values.expand(kept.shape), kept, strict=True)]
    longest = max(len(row) for row in rows)
    out = values.new_full((len(rows), longest), fill)
    for index, row in enumerate(rows):
        start = longest - len(row) if left else 0
        out[index, start : start + len(row)] = row
    return out


def _with_prompt(output: Any, prompt: Tensor, cut: int) -> Any:
    """The generated tokens behind the caller's own prompt."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    repeats = sequences.shape[0] // prompt.shape[0]
    whole = torch.cat([prompt.repeat_interleave(repeats, dim=0), sequences[:, cut:]], dim=1)
    if isinstance(output, Tensor):
        return whole
    output.sequences = whole
    return output
