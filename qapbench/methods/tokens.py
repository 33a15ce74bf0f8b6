"""Inputs of a pruner (`VisionTokens`) and its result (`Selection`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qapbench.errors import UserError

Space = Literal["patches", "projected"]
Sign = Literal["negative", "positive"]
RelevanceSign = Literal["auto", "negative", "positive"]
"""A sign as a spec gives it: "auto" is the sign of the text tower that image and question are compared with."""

# Dimensions of each tensor field. A letter stands for the same size in every field.
_SHAPES = {
    "projected": "B N D",
    "patches": "B N C",
    "cls_attention": "B N",
    "keys": "B N K",
    "cls_token": "B C",
    "image_embeds": "B N P",
    "text_embeds": "B M P",
    "prompt_embeds": "B L D",
    "last_cls_attention": "B N",
    "last_keys": "B N K",
    "attention_received": "B N",
    "middle_attention_received": "B N",
    "shallow_cls_attention": "B N",
    "downsampled": "B D Y X",
    "query_attention": "B N",
    "text_attention": "B N L",
    "context_attention": "B N",
    "rotated_keys": "B N H",
    "text_keys": "B L H",
    "final_states": "B N D",
    "text_states": "B L D",
    "embedded": "B E D",
}
_LETTERS = {name: tuple(shape.split()) for name, shape in _SHAPES.items()}


@dataclass(frozen=True)
class VisionTokens:
    """The visual tokens of a batch of images, with everything that a pruner or a metric may need to know of them.

    B is the number of images, N the number of tokens per image. An image that the model cuts into tiles counts as
    several: each tile is a row of the batch. `projected` is always set. A model records another field only if the
    `needs` of the strategy in use name it.

    Attributes:
        projected: [B, N, D] in the language model's embedding space: the output of the projector or, for pruners inside
            the decoder, the tokens' hidden states between two layers. Sensitivity is computed on it.
        patches: [B, N, C] the tokens before the projector.
        cls_attention: [B, N] attention from the CLS token to each patch, averaged over heads, in the vision tower's
            layer whose output the projector takes. The CLS column is dropped and the rest is not renormalised.
        keys: [B, N, K] key projections of that layer, with bias and unscaled; K = heads * head width.
        heads: number of heads of the tower's attention, which are concatenated in `keys`.
        cls_token: [B, C] the CLS token itself, before the projector.
        image_embeds: [B, N, P] patches in the joint image-text space of CLIP, not normalised.
        text_embeds: [B, M, P] the question in that space, cut into M segments, not normalised.
        prompt_embeds: [B, L, D] the language model's input embeddings of the prompt's text, or of the caller's
            `relevance_text`. Inside the decoder it is the prompt's text after the image.
        last_cls_attention: [B, N] like `cls_attention`, but in the tower's last layer and computed as a single head
            over the full width: softmax(q k^T / sqrt(K)).
        last_keys: [B, N, K] key projections of the tower's last layer, with bias and unscaled.
        attention_received: [B, N] attention that each patch receives, averaged over heads and over all queries
            including CLS, in the layer whose output the projector takes. The CLS column is dropped.
        middle_attention_received: [B, N] the same in a middle layer of the tower, the ninth of 24.
        shallow_cls_attention: [B, N] like `cls_attention`, but in a shallow layer of the tower, the sixth of 24.
        downsampled: [B, D, Y, X] what tower and projector make of the image after it was scaled down, so far that a
            grid of about its shape holds as many tokens as the budget, or the few more that the shape asks for.
        query_attention: [B, N] inside the decoder: attention from the prompt's last token to each visual token in one
            layer, averaged over heads. The columns of text tokens are dropped and the rest is not renormalised.
        text_attention: [B, N, L] inside the decoder: the same from each of the L text tokens after the image.
        context_attention: [B, N] inside the decoder: attention from the mean query of everything up to the image's last
            token to each visual token in one layer, before the rotary embedding, averaged over heads. The softmax is
            over all these places.
        rotated_keys: [B, N, H] inside the decoder: keys of one layer after the rotary embedding, all heads side by
            side; H = key heads * head width. The prompt's first token is at position 0, however it is padded.
        text_keys: [B, L, H] inside the decoder: the same of the L text tokens after the image.
        final_states: [B, N, D] inside the decoder: `projected` after the norm that follows the decoder's last layer.
        text_states: [B, L, D] inside the decoder: the hidden states of the L text tokens after the image, after the
            same norm.
        embedded: [B, E, D] inside the decoder: the image's tokens as they entered it, including those dropped since
            then; E >= N.
        grid: (height, width) of the grid of tokens; height * width = N.
        image_ids: one content hash per image. Seeded random choices depend on it, and so not on an image's position in
            the batch.
        relevance_sign: sign of the similarity between `image_embeds` and `text_embeds` that counts as relevance.
            "negative" means that a token matters more to the question, the less similar it is to it.
    """

    projected: Tensor
    patches: Tensor | None = None
    cls_attention: Tensor | None = None
    keys: Tensor | None = None
    heads: int = 1
    cls_token: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    prompt_embeds: Tensor | None = None
    last_cls_attention: Tensor | None = None
    last_keys: Tensor | None = None
    attention_received: Tensor | None = None
    middle_attention_received: Tensor | None = None
    shallow_cls_attention: Tensor | None = None
    downsampled: Tensor | None = None
    query_attention: Tensor | None = None
    text_attention: Tensor | None = None
    context_attention: Tensor | None = None
    rotated_keys: Tensor | None = None
    text_keys: Tensor | None = None
    final_states: Tensor | None = None
    text_states: Tensor | None = None
    embedded: Tensor | None = None
    grid: tuple[int, int] | None = None
    image_ids: tuple[str, ...] | None = None
    relevance_sign: Sign = "negative"

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        for name in _SHAPES:
            value = getattr(self, name)
            if value is not None:
                _check_tensor(name, value, sizes)
        if self.keys is not None and self.keys.shape[-1] % self.heads:
            raise UserError(f"tokens.keys: width {self.keys.shape[-1]} is not a multiple of heads={self.heads}")
        if self.grid is not None and self.grid[0] * self.grid[1] != self.count:
            raise UserError(f"tokens.grid: {self.grid} does not hold {self.count} tokens")
        if self.image_ids is not None and len(self.image_ids) != self.batch:
            raise UserError(f"tokens.image_ids: {len(self.image_ids)} ids for {self.batch} images")
        if self.relevance_sign not in get_args(Sign):
            raise UserError(f"tokens.relevance_sign: must be negative or positive, got {self.relevance_sign!r}")

    @property
    def batch(self) -> int:
        """Number of images."""
        return self.projected.shape[0]

    @property
    def count(self) -> int:
        """Number of tokens per image."""
        return self.projected.shape[1]

    def require(self, name: str, reader: str) -> Tensor:
        """Return the field `name`.

        Args:
            name: name of a tensor field.
            reader: who needs the field, for the message.

        Raises:
            UserError: the model did not record the field.
        """
        value = getattr(self, name)
        if value is None:
            raise UserError(f"{reader} needs tokens.{name}, which this model did not record")
        return value

    def relevance_of(self, similarity: Tensor, sign: RelevanceSign = "auto") -> Tensor:
        """The relevance of tokens, higher means more relevant, from their similarity to the question.

        Args:
            similarity: [B, N] between `image_embeds` and `text_embeds`, in whatever measure.
            sign: sign of the similarity that counts as relevance; "auto" takes `relevance_sign`.
        """
        counted = self.relevance_sign if sign == "auto" else sign
        return similarity if counted == "positive" else -similarity

    def to(self, device: torch.device) -> VisionTokens:
        """The same tokens with every field on a device; the same object if all are there."""
        held = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        if all(value.device == device for value in held.values()):
            return self
        moved: dict[str, Any] = {name: value.to(device) for name, value in held.items()}
        return replace(self, **moved)

    def adding(self, sign: Sign, **values: Tensor) -> VisionTokens:
        """A copy with further tensor fields, which are checked; those that are there already were.

        Args:
            sign: value of `relevance_sign`.
            values: the fields.

        Raises:
            UserError: a field has another shape, or values that are not finite.
        """
        sizes: dict[str, int] = {}
        for name, held in vars(self).items():
            if isinstance(held, Tensor) and name not in values:
                sizes |= zip(_LETTERS[name], held.shape, strict=True)
        for name, value in values.items():
            _check_tensor(name, value, sizes)
        return self._changed(**values, relevance_sign=sign)

    def only(self, names: Iterable[str]) -> VisionTokens:
        """A copy with the optional tensor fields and `image_ids` set to None, except those in `names`."""
        return self._changed(**dict.fromkeys({*_SHAPES, "image_ids"} - {*names, "projected"}))

    def _changed(self, **values: Any) -> VisionTokens:
        """A copy with other values, which were checked already."""
        made = object.__new__(VisionTokens)  # `replace` would check all values again
        vars(made).update({**vars(self), **values})
        return made

    def take(self, places: Tensor, grid: tuple[int, int] | None = None) -> VisionTokens:
        """The tokens at the same places in every image.

        Args:
            places: [N'] indices of tokens.
            grid: (height, width) of the grid that they form, if they form one.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in per_token():
            if values[name] is not None:
                values[name] = values[name][:, places]
        return VisionTokens(**{**values, "grid": grid})

    @staticmethod
    def cat(parts: Sequence[VisionTokens]) -> VisionTokens:
        """Concatenate batches along the batch dimension. They must have the same fields and sizes."""
        values = {field.name: getattr(parts[0], field.name) for field in fields(parts[0])}
        for name in _SHAPES:
            if values[name] is not None:
                values[name] = torch.cat([getattr(part, name) for part in parts])
        if parts[0].image_ids is not None:
            values["image_ids"] = tuple(image for part in parts for image in part.image_ids or ())
        return VisionTokens(**values)

    def __getitem__(self, index: int | slice) -> VisionTokens:
        """The tokens of the indexed images, still as a batch: an integer gives a batch of one."""
        if isinstance(index, int):
            index = range(self.batch)[index]  # raises IndexError past the end, which ends iteration
            index = slice(index, index + 1)
        elif index.indices(self.batch) == (0, self.batch, 1):
            return self
        held = {name: vars(self)[name] for name in (*_SHAPES, "image_ids")}
        return self._changed(**{name: value[index] for name, value in held.items() if value is not None})


def per_token() -> list[str]:
    """Names of the fields that hold one value or vector per token."""
    return [name for name, letters in _LETTERS.items() if letters[1] == "N"]


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # The extremes take one pass and no memory, in any dtype, and are NaN if one value is.
    return not values.numel() or all(math.isfinite(extreme.item()) for extreme in torch.aminmax(values))


def _check_tensor(name: str, value: Tensor, sizes: dict[str, int]) -> None:
    """Check type, dimensions and finiteness of one field. `sizes` collects the size of each dimension seen so far."""
    letters = _LETTERS[name]
    if not isinstance(value, Tensor) or value.ndim != len(letters) or not value.is_floating_point():
        got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"tokens.{name}: expected a floating tensor [{', '.join(letters)}], got {got}")
    for letter, size in zip(letters, value.shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            raise UserError(f"tokens.{name}: {letter} is {size}, but other fields have {letter}={sizes[letter]}")
    if not all_finite(value):
        bad = int((~torch.isfinite(value)).sum())
        raise UserError(f"tokens.{name}: {bad} of {value.numel()} values are not finite")


@dataclass(frozen=True)
class Selection:
    """The tokens that the language model will see in place of an image's N tokens.

    They are K kept tokens and M merged ones. B is the number of images in the batch.

    Attributes:
        indices: [B, K] int64 raster positions of the kept tokens, ascending and without duplicates.
        merged: [B, M, width] additional tokens made from others, or None.
        space: space of `merged` and `updated`: "patches" (the model applies its projector) or "projected".
        front: number of merged tokens placed before the kept ones (VisionZip's CLS token); the others come after them.
        updated: [B, K, width] new values for the kept tokens, if they absorb others (PruMerge's cluster centres). None
            leaves the kept tokens as they are.
        made: [B, K] bool, True where `updated` holds a token made from several (SparseVLM's clusters). Such a token
            counts as merged and not as kept, and stands at its index. None if there are no such tokens.
    """

    indices: Tensor
    merged: Tensor | None = None
    space: Space = "projected"
    front: int = 0
    updated: Tensor | None = None
    made: Tensor | None = None

    @property
    def budget(self) -> int:
        """Tokens per image that the language model will see: K + M."""
        return self.indices.shape[1] + (self.merged.shape[1] if self.merged is not None else 0)

    def mask(self, count: int) -> Tensor:
        """[B, count] bool, True at the kept positions. `count` is the number N of tokens per image."""
        mask = torch.zeros(self.indices.shape[0], count, dtype=torch.bool, device=self.indices.device)
        return mask.scatter_(1, self.indices, True)

    @staticmethod
    def everything(tokens: VisionTokens) -> Selection:
        """A selection that keeps all tokens unchanged."""
        indices = torch.arange(tokens.count, device=tokens.projected.device)
        return Selection(indices.expand(tokens.batch, -1).contiguous())

    @staticmethod
    def stack(parts: list[Selection]) -> Selection:
        """Concatenate selections along the batch dimension. All must come from the same pruner and budget."""
        first = parts[0]
        merged = None if first.merged is None else torch.cat([p.merged for p in parts if p.merged is not None])
        updated = None if first.updated is None else torch.cat([p.updated for p in parts if p.updated is not None])
        made = None if first.made is None else torch.cat([p.made for p in parts if p.made is not None])
        indices = torch.cat([part.indices for part in parts])
        return Selection(indices, merged, first.space, first.front, updated, made)
