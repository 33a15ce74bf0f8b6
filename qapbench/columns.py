"""Which columns of a prompt a decoder's layer holds, and what a layer is given cut to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The columns of the prompt that the rows of a batch hold at some layer.

    Attributes:
        columns: [B, S] columns of the prompt, ascending where valid.
        valid: [B, S] bool; the rest is padding.
        full: whether nothing is padding.
    """

    columns: Tensor
    valid: Tensor
    full: bool

    @staticmethod
    def of(columns: Tensor, valid: Tensor) -> Layout:
        return Layout(columns, valid, bool(valid.all()))

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """(places in the row, columns of the prompt) of what is valid there."""
        places = self.valid[index].nonzero()[:, 0]
        return places, self.columns[index, places]

    def without(self, gone: Tensor) -> tuple[Layout, Tensor]:
        """The layout with the places `gone` [B, S] taken out, and the places [B, S'] of this one that it holds.

        Rows of different lengths are padded in front, whatever side the prompt was padded on.
        """
        stays = self.valid & ~gone
        longest = int(stays.sum(dim=1).max())
        places = stays.int().argsort(dim=1, stable=True)[:, -longest:]
        return Layout.of(self.columns.gather(1, places), stays.gather(1, places)), places

    def repeated(self, times: int) -> Layout:
        """Every row several times in a row."""
        if times == 1:
            return self
        columns, valid = (x.repeat_interleave(times, dim=0) for x in (self.columns, self.valid))
        return Layout(columns, valid, self.full)

    def behind(self, prompt: int, new: int) -> Layout:
        """With `new` columns behind a prompt of that length."""
        fresh = torch.arange(prompt, prompt + new, device=self.columns.device).expand(len(self.columns), -1)
        columns = torch.cat([self.columns, fresh], dim=1)
        return Layout(columns, torch.cat([self.valid, torch.ones_like(fresh, dtype=torch.bool)], dim=1), self.full)


def cut(kwargs: dict[str, Any], layout: Layout, flash: bool) -> dict[str, Any]:
    """What a layer is given for a whole prompt (mask, rotary embedding, positions), cut to the layout."""
    columns = layout.columns
    short: dict[str, Any] = {"attention_mask": cut_mask(kwargs.get("attention_mask"), layout, columns.shape[1], flash)}
    rotary = kwargs["position_embeddings"]
    width = rotary[0].shape[-1]
    place = columns.unsqueeze(-1).expand(-1, -1, width)
    short["position_embeddings"] = tuple(x.expand(len(columns), -1, -1).gather(1, place) for x in rotary)
    positions = kwargs.get("position_ids")
    if positions is not None:
        short["position_ids"] = positions.expand(*positions.shape[:-2], len(columns), -1).gather(-1, columns)
    return short


def cut_mask(mask: Tensor | None, keys: Layout, queries: int, flash: bool) -> Tensor | None:
    """An attention mask over the prompt, cut to the columns that a layer's keys hold.

    Args:
        mask: none, [B, L] (flash attention), or [B, 1, Q, L], boolean or added to the logits.
        keys: the layer's own; the last `queries` of its columns ask.
        flash: whether attention takes masks of two dimensions only.
    """
    batch, length = keys.columns.shape
    if mask is None:
        if keys.full:
            return None
        if flash:
            return keys.valid
        mask = torch.ones(queries, length, dtype=torch.bool, device=keys.columns.device).tril(length - queries)
        mask = mask.expand(batch, 1, -1, -1)
    elif mask.ndim == 2:
        return mask.gather(1, keys.columns) * keys.valid
    else:
        mask = mask.expand(batch, -1, -1, -1)
        if mask.shape[2] != queries:
            rows = keys.columns[:, None, -queries:, None]
            mask = mask.gather(2, rows.expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, keys.columns[:, None, None, :].expand(-1, mask.shape[1], queries, -1))
    if keys.full:
        return mask
    seen, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    mask = mask.masked_fill(~keys.valid[:, None, None, :], hidden)
    # Padding that asks sees itself: a row without any key has no softmax.
    itself = torch.ones(queries, length, dtype=torch.bool, device=mask.device).tril(length - queries)
    itself = itself.triu(length - queries) & ~keys.valid[:, None, -queries:, None]
    return mask.masked_fill(itself, seen)
