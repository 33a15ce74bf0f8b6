"""Levels in learned shares of the ranges of weights and of tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qapbench import Format, Grid, Levels, grouped, straight_through


def clip_rounded(w: Tensor, cut: Tensor, format: Format, rows: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Grid]]:
    """Cut a weight [out, in] to shares of its ranges, map its rows, and round it; with the levels of each part.

    Args:
        w: the weight.
        cut: [2, out, groups, 1] shares of the lower and the upper ends, before the sigmoid.
        format: format of the weight.
        rows: maps the rows.
    """
    low, high = cut.sigmoid()
    parts, start = [], 0
    for part in grouped(w, format.group_size):
        stop = start + part.shape[1]
        ends = part.amin(-1, keepdim=True) * low[:, start:stop], part.amax(-1, keepdim=True) * high[:, start:stop]
        parts.append(torch.minimum(torch.maximum(part, ends[0]), ends[1]).flatten(1))
        start = stop
    mapped = grouped(rows(torch.cat(parts, dim=1)), format.group_size)
    grids = [grid_of(part, format, 1.0, 1.0) for part in mapped]
    return torch.cat([grid(part).flatten(1) for grid, part in zip(grids, mapped, strict=True)], dim=1), grids


def grid_of(x: Tensor, format: Format, low: Tensor | float, high: Tensor | float) -> Grid:
    """The levels of each row of x for these shares of the ends of its range. Symmetric ones are all 2^bits."""
    least, most = x.amin(dim=-1, keepdim=True) * low, x.amax(dim=-1, keepdim=True) * high
    if not format.symmetric:
        return Levels(format.bits, False, "qmax", format.zero_point).grid(least, most)
    reach = torch.maximum(-least, most)
    divisor = "full" if format.divisor == "qmax" else format.divisor
    return Levels(format.bits, True, divisor).grid(-reach, reach)


@dataclass(frozen=True)
class ClippedInput:
    """Rounding of tokens in a share of each one's range.

    Attributes:
        format: format of the tokens. Floating-point formats keep their whole range.
        low: share of the lower end, before the sigmoid.
        high: share of the upper end.
    """

    format: Format
    low: Tensor
    high: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        if self.format.format != "int":
            return straight_through(x, self.format(x.detach()))
        low, high = self.low.sigmoid().to(x.device), self.high.sigmoid().to(x.device)
        parts = grouped(x.float(), self.format.group_size)
        done = [grid_of(part, self.format, low, high)(part).flatten(1) for part in parts]
        return torch.cat(done, dim=1).view(x.shape).to(x.dtype)
