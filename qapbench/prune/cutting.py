"""The arguments of a call that have one value per token, cut to the columns that stay."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qapbench.quantize.call_tokens import UNLABELLED

from .splice import gather_columns

TYPES = ("mm_token_type_ids", "token_type_ids")
"""Inputs that tell images from text, one value per token, 0 for text and padding."""
PER_TOKEN = {"labels": UNLABELLED, **dict.fromkeys(TYPES, 0)}
"""Inputs with one value per token, besides ids, mask and positions -> their padding. The loss skips labels of -100."""


def cut(
    kwargs: dict[str, Any], mask: Tensor, columns: list[Tensor], given: Tensor | None, keep: bool, pad: int
) -> dict[str, Any]:
    """The keyword arguments with every input per token cut to some columns, padded on the side that was padded.

    Args:
        kwargs: the model's keyword arguments.
        mask: its attention mask [B, L].
        columns: for each row, the columns that stay.
        given: positions that are more than a count (M-RoPE), which are always kept; None if the model counts.
        keep: whether tokens keep the positions that they had.
        pad: token id of padding.
    """
    left = len(columns) > 1 and bool(mask[:, -1].all())  # a row alone is not padded
    short = gather_columns(mask, columns, 0, left)
    if given is not None:
        positions = gather_columns(given, columns, 0, left)
    elif keep:
        counted = kwargs.get("position_ids")
        counted = (mask.cumsum(dim=-1) - 1).clamp(min=0) if counted is None else counted.expand_as(mask)
        positions = gather_columns(counted, columns, 0, left)
    else:
        positions = (short.cumsum(dim=-1) - 1).clamp(min=0)
    gathered = {
        name: gather_columns(kwargs[name], columns, fill, left)
        for name, fill in {"input_ids": pad, **PER_TOKEN}.items()
        if kwargs.get(name) is not None
    }
    return {**kwargs, **gathered, "attention_mask": short, "position_ids": positions}
