"""AutoRound's levels: those of a weight whose rounding and ranges are learned."""

from collections.abc import Iterator

import torch
from torch import Tensor

from qapbench import Format, Grid, grouped, round_through

SMALLEST = 1e-8  # smallest magnitude of a scale


def rounded(w: Tensor, format: Format, v: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Round a weight [out, in], differentiably.

    Args:
        w: the weight.
        format: its format.
        v: [out, in], added in units of the scale before rounding.
        low: [out, groups], factors of the lower ends of the ranges.
        high: [out, groups], factors of the upper ends.
    """
    parts, top = [], 2.0**format.bits
    cut = zip(scales(w, format, low, high), grouped(v, format.group_size), strict=True)
    for (part, scale, zero), shift in cut:
        if zero is None:
            levels = round_through(part / scale + shift).clamp(-top / 2, top / 2 - 1)
        else:
            levels = (round_through(part / scale + shift) + zero).clamp(0, top - 1) - zero
        parts.append((scale * levels).flatten(1))
    return torch.cat(parts, dim=1).to(w.dtype)


def scales(w: Tensor, format: Format, low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Each part [out, groups, columns] that `grouped` cuts a weight into, its scales, and its zero points.

    Symmetric levels have no zero points, and a scale with a sign. The arguments are those of `rounded`.
    """
    start, top = 0, 2.0**format.bits
    for part in grouped(w.float(), format.group_size):
        groups = slice(start, start + part.shape[1])
        start += part.shape[1]
        least = part.amin(dim=-1, keepdim=True).clamp(max=0) * low[:, groups].unsqueeze(-1)
        most = part.amax(dim=-1, keepdim=True).clamp(min=0) * high[:, groups].unsqueeze(-1)
        if format.symmetric:
            scale = torch.where(most < -least, -least, -most) / (top / 2)
            yield part, torch.where(scale < 0, scale.clamp(max=-SMALLEST), scale.clamp(min=SMALLEST)), None
        else:
            scale = ((most - least) / (top - 1)).clamp(min=SMALLEST)
            yield part, scale, round_through(-least / scale)


def grids(w: Tensor, format: Format, low: Tensor, high: Tensor) -> list[Grid]:
    """The levels that `rounded` rounds to, with positive scales: a negative one turns the order of the levels round."""
    top, found = 2**format.bits, []
    for _, scale, zero in scales(w, format, low, high):
        turned = torch.where(scale < 0, top // 2 - 1, top // 2).float() if zero is None else zero
        found.append(Grid(scale.abs(), turned, 0, top - 1))
    return found
