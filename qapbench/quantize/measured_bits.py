"""How many bits a tensor has as it reaches a matmul, measured on its values."""

from __future__ import annotations

import torch
from torch import Tensor

from qapbench.methods.floating import Element, FloatLevels
from qapbench.methods.formats import Format
from qapbench.methods.kv import KVSide

ENOUGH = 32  # values whose gaps tell a step
OFF_GRID = 0.15  # of a step, mean distance: see _off_grid
ROWS = 8  # rows of a tensor that are inspected: enough to see 2^bits levels, cheap enough for every linear


def most_levels(x: Tensor, side: KVSide) -> int:
    """Most distinct values in any group of quantized keys or values [H, n, D], of which a few rows are inspected."""
    if not x.numel():
        return 0
    rows = (x.transpose(-1, -2) if side.granularity == "channel" else x).flatten(0, -2)[:ROWS]
    return max(_distinct(group) for group in rows.float().split(side.group_size, dim=-1))


def measured_bits(x: Tensor, format: Format | None) -> tuple[int, int]:
    """(bits, levels) of a tensor [..., D] as it reached a matmul.

    A few rows are inspected. Quantized is what has at most 2^bits distinct values in every group and, where a
    group is too small for that to say anything, values on the format's grid. Else the dtype's own width is reported.
    """
    full = torch.finfo(x.dtype).bits
    if format is not None and format.granularity == "channel":  # a scale for each channel, over a sample's tokens
        x = x.flatten(0, -3)[0].mT if x.ndim > 2 else x.mT
    rows = x.detach().reshape(-1, x.shape[-1])[:ROWS].float()
    size = min((format.group_size if format else None) or rows.shape[-1], rows.shape[-1])
    groups = list(rows.split(size, dim=-1))
    levels = max(_distinct(group) for group in groups)
    if format is None or levels > 2**format.bits:
        return full, levels
    if size > 2**format.bits:
        return format.bits, levels
    levels_of = format.levels
    if isinstance(levels_of, FloatLevels):
        telling = _off_floats(groups[0], levels_of.element) < OFF_GRID
    else:
        telling = _off_grid(groups[0], format.bits, torch.finfo(x.dtype).eps) < OFF_GRID
    return (format.bits if telling else full), levels


def _distinct(group: Tensor) -> int:
    """Most distinct values in a row of [R, G]."""
    return int((group.sort(dim=-1).values.diff(dim=-1) != 0).sum(dim=-1).max()) + 1 if group.numel() else 0


def _off_floats(group: Tensor, element: Element) -> float:
    """How far values [R, G] are from numbers of a floating-point type times a scale, in steps of that type.

    The largest magnitude of a row may be any number of the type. A scale that is off by a power of two makes no
    difference, so only its mantissa has to be tried.
    """
    most = group.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    binade, distances = 2.0**element.exponent, []
    for numerator in range(2**element.mantissa, 2 ** (element.mantissa + 1)):
        largest = binade * numerator / 2**element.mantissa
        if largest <= element.top:
            scaled = group / (most / largest)
            exponent = scaled.abs().clamp(min=2.0**element.least).log2().floor()
            step = torch.exp2(exponent - element.mantissa)
            distances.append(((scaled - element.round(scaled)).abs() / step).mean(dim=-1))
    return float(torch.stack(distances).amin(dim=0).median())


def _off_grid(group: Tensor, bits: int, eps: float) -> float:
    """How far values [R, G] are from multiples of a step, in steps: 0 on a grid, 0.25 for values at random.

    The step is the range (with zero) over the number of levels, give or take the one that a rounded zero point
    costs; or, where a scale is shared with values that are not here (other tokens, outliers), the least gap that so
    many levels can have. Few values lie on a grid if some step between 1 and 1 / (2^bits - 1) of their own span
    divides all of their distances, up to what rounding to their dtype, with the relative precision `eps`, explains.
    """
    low, high = group.amin(-1, keepdim=True).clamp(max=0), group.amax(-1, keepdim=True).clamp(min=0)
    reach = torch.maximum(-low, high)
    spans = [(high - low, 2**bits + extra) for extra in (-2, -1, 0)] + [(reach, 2 ** (bits - 1) - 1)]
    distances = []
    for span, steps in spans:
        scaled = group / (span / steps).clamp(min=torch.finfo(torch.float32).tiny)
        distances.append((scaled - scaled.round()).abs().mean(dim=-1))
    if group.shape[-1] >= ENOUGH:
        values = group.sort(dim=-1).values
        gaps = values.diff(dim=-1)
        shortest = (0.75 * (values[..., -1:] - values[..., :1]) / 2**bits).clamp(min=torch.finfo(torch.float32).tiny)
        step = gaps.masked_fill(gaps < shortest, torch.inf).amin(-1, keepdim=True)
        scaled = (values - values[..., :1]) / step
        distances.append((scaled - scaled.round()).abs().mean(dim=-1))
    else:
        values = group.sort(dim=-1).values
        span = values[..., -1:] - values[..., :1]
        step = (
            (span / torch.arange(1, 2**bits, device=group.device))
            .unsqueeze(-1)
            .clamp(min=torch.finfo(torch.float32).tiny)
        )
        scaled = (values - values[..., :1]).unsqueeze(-2) / step
        noise = 2 * eps * (reach.unsqueeze(-1) / step + scaled)
        fits = ((scaled - scaled.round()).abs() <= noise.clamp(max=OFF_GRID / 2)).all(dim=-1).any(dim=-1)
        distances.append(torch.where(fits, 0.0, torch.inf))
    return float(torch.stack(distances).amin(dim=0).median())
