"""What a strategy may look at (`VisionTokens`) and what it answers (`Selection`)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from .errors import UserError

Space = Literal["patches", "projected"]

_SHAPES = {
    "projected": "B N D", "patches": "B N C", "cls_attention": "B N", "keys": "B N K", "cls_token": "B C",
    "image_embeds": "B N P", "text_embeds": "B M P", "prompt_embeds": "B L D",
    "last_cls_attention": "B N", "last_keys": "B N K",
    "attention_received": "B N", "middle_attention_received": "B N",
}  # fmt: skip


@dataclass(frozen=True)
class VisionTokens:
    """The visual tokens of a batch of images, seen from every side that a strategy may need.

    A model records a field only when some strategy's `needs` names it; `projected` is always there.

    Attributes:
        projected: [B, N, D] after the projector, in the language model's space. Sensitivity is computed on it.
        patches: [B, N, C] before the projector.
        cls_attention: [B, N] attention of the CLS token to each patch, mean over heads, in the layer whose
            output the projector takes; the CLS column is dropped and the rest is not renormalised.
        keys: [B, N, K] key projections (with bias, unscaled) of that layer; K = heads * head width.
        heads: number of heads that `keys` holds side by side.
        cls_token: [B, C] the CLS token itself, before the projector.
        image_embeds: [B, N, P] patches in the CLIP joint space, not normalised.
        text_embeds: [B, M, P] the question in that space, in M segments, not normalised.
        prompt_embeds: [B, L, D] the language model's embeddings of the prompt's text.
        last_cls_attention: [B, N] as `cls_attention`, but in the tower's last layer and of a single head over its full
            width: softmax(q k^T / sqrt(K)).
        last_keys: [B, N, K] key projections (with bias, unscaled) of the tower's last layer.
        attention_received: [B, N] attention that each patch receives, mean over heads and over all queries (CLS among
            them), in the layer whose output the projector takes; the CLS column is dropped.
        middle_attention_received: [B, N] the same in a middle layer, the ninth of 24.
        grid: (height, width) of the patch grid; height * width = N.
        image_ids: one content hash per image, so that a seeded choice depends on the image and not on its
            place in a batch.
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
    grid: tuple[int, int] | None = None
    image_ids: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        for name, shape in _SHAPES.items():
            value = getattr(self, name)
            if value is not None:
                _check_tensor(name, value, shape, sizes)
        if self.keys is not None and self.keys.shape[-1] % self.heads:
            raise UserError(f"tokens.keys: width {self.keys.shape[-1]} is not a multiple of heads={self.heads}")
        if self.grid is not None and self.grid[0] * self.grid[1] != self.count:
            raise UserError(f"tokens.grid: {self.grid} does not hold {self.count} tokens")
        if self.image_ids is not None and len(self.image_ids) != self.batch:
            raise UserError(f"tokens.image_ids: {len(self.image_ids)} ids for {self.batch} images")

    @property
    def batch(self) -> int:
        return self.projected.shape[0]

    @property
    def count(self) -> int:
        """Number of tokens per image."""
        return self.projected.shape[1]

    def require(self, name: str, reader: str) -> Tensor:
        """The field, or an error that says who needs it."""
        value = getattr(self, name)
        if value is None:
            raise UserError(f"{reader} needs tokens.{name}, which this model did not record")
        return value

    def only(self, names: Iterable[str]) -> VisionTokens:
        """The same tokens with those optional fields alone, whatever else was recorded."""
        kept = copy.copy(self)
        for name in {*_SHAPES, "image_ids"} - {*names, "projected"}:
            object.__setattr__(kept, name, None)  # nothing that was checked changes, so nothing is checked again
        return kept

    def take(self, places: Tensor, grid: tuple[int, int] | None = None) -> VisionTokens:
        """The tokens at places [N'] of every image, which form `grid`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in per_token():
            if values[name] is not None:
                values[name] = values[name][:, places]
        return VisionTokens(**{**values, "grid": grid})

    @staticmethod
    def cat(parts: Sequence[VisionTokens]) -> VisionTokens:
        """Batches of one size and with the same fields, as one batch."""
        values = {field.name: getattr(parts[0], field.name) for field in fields(parts[0])}
        for name in _SHAPES:
            if values[name] is not None:
                values[name] = torch.cat([getattr(part, name) for part in parts])
        if parts[0].image_ids is not None:
            values["image_ids"] = tuple(image for part in parts for image in part.image_ids or ())
        return VisionTokens(**values)

    def __getitem__(self, index: int | slice) -> VisionTokens:
        """The tokens of some images of the batch, still as a batch."""
        if isinstance(index, int):
            index = range(self.batch)[index]  # IndexError past the end, so that iteration stops
            index = slice(index, index + 1)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in (*_SHAPES, "image_ids"):
            if values[name] is not None:
                values[name] = values[name][index]
        return VisionTokens(**values)


def per_token() -> list[str]:
    """Names of the fields that hold something for each token."""
    return [name for name, shape in _SHAPES.items() if shape.split()[1] == "N"]


def _check_tensor(name: str, value: Tensor, shape: str, sizes: dict[str, int]) -> None:
    letters = shape.split()
    if not isinstance(value, Tensor) or value.ndim != len(letters) or not value.is_floating_point():
        got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"tokens.{name}: expected a floating tensor [{', '.join(letters)}], got {got}")
    for letter, size in zip(letters, value.shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            raise UserError(f"tokens.{name}: {letter} is {size}, but other fields have {letter}={sizes[letter]}")
    if not torch.isfinite(value).all():
        bad = int((~torch.isfinite(value)).sum())
        raise UserError(f"tokens.{name}: {bad} of {value.numel()} values are not finite")


@dataclass(frozen=True)
class Selection:
    """What a pruner keeps.

    Attributes:
        indices: [B, K] int64, ascending, no duplicates: raster positions of the tokens kept.
        merged: [B, M, width] tokens made from others, or None.
        space: where `merged` and `updated` live: "patches" (the model projects them) or "projected".
        front: how many of the merged tokens stand before the kept ones (VisionZip's CLS); the rest follow.
        updated: [B, K, width] what stands at the kept positions where they absorb others (PruMerge's centres); None
            keeps the tokens as they are.
    """

    indices: Tensor
    merged: Tensor | None = None
    space: Space = "projected"
    front: int = 0
    updated: Tensor | None = None

    @property
    def budget(self) -> int:
        """Tokens per image that the language model will see: K + M."""
        return self.indices.shape[1] + (self.merged.shape[1] if self.merged is not None else 0)

    def mask(self, count: int) -> Tensor:
        """[B, count] bool, true at the kept positions."""
        mask = torch.zeros(self.indices.shape[0], count, dtype=torch.bool, device=self.indices.device)
        return mask.scatter_(1, self.indices, True)

    @staticmethod
    def stack(parts: list[Selection]) -> Selection:
        """Selections of single images as one batch (all of one pruner and budget)."""
        first = parts[0]
        merged = None if first.merged is None else torch.cat([p.merged for p in parts if p.merged is not None])
        updated = None if first.updated is None else torch.cat([p.updated for p in parts if p.updated is not None])
        return Selection(torch.cat([part.indices for part in parts]), merged, first.space, first.front, updated)
