"""Columns of a prompt that a decoder layer holds, and the layer's arguments cut to these columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """The columns of the prompt that each row of a batch holds at some layer.

    Attributes:
        columns: [B, S] columns of the prompt, ascending where valid.
        valid: [B, S] bool, True where a row holds a token and False where it is padded.
        full: whether there is no padding.
    """

    columns: Tensor
    valid: Tensor
    full: bool

    @staticmethod
    def of(columns: Tensor, valid: Tensor) -> TokenLayout:
        """A layout of these columns; `full` is computed from `valid`."""
        return TokenLayout(columns, valid, bool(valid.all()))

    def to(self, device: torch.device) -> TokenLayout:
        """The same layout on a device; the same object if it is there."""
        if self.columns.device == device:
            return self
        return TokenLayout(self.columns.to(device), self.valid.to(device), self.full)

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """(places in the row, columns of the prompt) of the valid tokens of one row."""
        places = self.valid[index].nonzero()[:, 0]
        return places, self.columns[index, places]

    def without(self, gone: Tensor) -> tuple[TokenLayout, Tensor]:
        """Remove tokens. Rows of different lengths are padded on the left, whichever side the prompt was padded on.

        Args:
            gone: [B, S] bool, True for the tokens to remove.

        Returns:
            (the new layout, the places [B, S'] in this layout of the tokens that it holds).
        """
        stays = self.valid & ~gone
        longest = int(stays.sum(dim=1).max())
        places = stays.int().argsort(dim=1, stable=True)[:, -longest:]
        return TokenLayout.of(self.columns.gather(1, places), stays.gather(1, places)), places

    def repeated(self, times: int) -> TokenLayout:
        """Repeat every row `times` times, the copies of a row side by side."""
        if times == 1:
            return self
        columns, valid = (x.repeat_interleave(times, dim=0) for x in (self.columns, self.valid))
        return TokenLayout(columns, valid, self.full)

    def ahead_of(self, tail: int) -> TokenLayout:
        """Without the last `tail` columns, which hold tokens in every row."""
        return TokenLayout(self.columns[:, :-tail], self.valid[:, :-tail], self.full) if tail else self

    def behind(self, prompt: int, new: int) -> TokenLayout:
        """Append `new` columns that follow a prompt of `prompt` columns."""
        fresh = torch.arange(prompt, prompt + new, device=self.columns.device).expand(len(self.columns), -1)
        columns = torch.cat([self.columns, fresh], dim=1)
        return TokenLayout(columns, torch.cat([self.valid, torch.ones_like(fresh, dtype=torch.bool)], dim=1), self.full)


def cut(kwargs: dict[str, Any], layout: TokenLayout, flat: bool) -> dict[str, Any]:
    """Cut a layer's arguments for a whole prompt (mask, rotary embedding, positions) to the columns of a layout.

    Args:
        kwargs: the layer's keyword arguments.
        layout: the columns that the layer holds.
        flat: whether the layer takes two-dimensional masks only, as flash and linear attention do.

    Returns:
        The arguments to replace.
    """
    columns = layout.columns  # layers, masks and angles may be on several devices
    short: dict[str, Any] = {"attention_mask": cut_mask(kwargs.get("attention_mask"), layout, columns.shape[1], flat)}
    rotary = kwargs["position_embeddings"]
    width = rotary[0].shape[-1]
    place = columns.unsqueeze(-1).expand(-1, -1, width)
    place = place.to(rotary[0].device)
    short["position_embeddings"] = tuple(x.expand(len(columns), -1, -1).gather(1, place) for x in rotary)
    positions = kwargs.get("position_ids")
    if positions is not None:
        own = columns.to(positions.device)
        short["position_ids"] = positions.expand(*positions.shape[:-2], len(columns), -1).gather(-1, own)
    return short


def causal(keys: TokenLayout, queries: int, dtype: torch.dtype) -> Tensor:
    """A mask [B, 1, Q, S] under which queries see all keys before them and themselves, and no padding.

    Args:
        keys: layout of the layer's keys.
        queries: number of queries, which are the last of these columns.
        dtype: bool, or that of a mask which is added to the logits.
    """
    length = keys.columns.shape[1]
    seen = torch.ones(queries, length, dtype=torch.bool, device=keys.columns.device).tril(length - queries)
    seen = seen & keys.valid[:, None, None, :]
    if dtype == torch.bool:
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def cut_mask(mask: Tensor | None, keys: TokenLayout, queries: int, flat: bool) -> Tensor | None:
    """Cut an attention mask over the prompt to the columns that a layer's keys hold.

    Args:
        mask: None, [B, L] (flash and linear attention), or [B, 1, Q, L], either boolean or added to the logits.
        keys: layout of the layer's keys.
        queries: number of queries, which are the last of these columns.
        flat: whether the layer takes two-dimensional masks only, as flash and linear attention do.

    Returns:
        A mask of one of these shapes; None if none is needed.
    """
    keys = keys if mask is None else keys.to(mask.device)
    batch, length = keys.columns.shape
    if mask is None:
        if keys.full:
            return None
        if flat:
            return keys.valid
        mask = causal(keys, queries, torch.bool)
    elif mask.ndim == 2:
        return mask.gather(1, keys.columns) * keys.valid
    else:
        mask = mask.expand(batch, -1, -1, -1)
        if mask.shape[2] == mask.shape[3]:  # a row for each column of the prompt, which may be in another place now
            rows = keys.columns[:, None, -queries:, None]
            mask = mask.gather(2, rows.expand(-1, mask.shape[1], -1, mask.shape[3]))
        mask = mask.gather(3, keys.columns[:, None, None, :].expand(-1, mask.shape[1], queries, -1))
    if keys.full:
        return mask
    visible, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    mask = mask.masked_fill(~keys.valid[:, None, None, :], hidden)
    # A query that is padding attends to itself: softmax over no key at all is undefined.
    itself = torch.ones(queries, length, dtype=torch.bool, device=mask.device).tril(length - queries)
    itself = itself.triu(length - queries) & ~keys.valid[:, None, -queries:, None]
    return mask.masked_fill(itself, visible)
