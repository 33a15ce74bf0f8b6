"""NF4: 4-bit levels at quantiles of a normal distribution (Dettmers et al., QLoRA, NeurIPS 2023, section 3)."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from .affine import grouped

# The levels as tabulated in appendix E of the paper.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCK_OF_SCALES = 256  # scales that share one scale of their own in double quantization


def normal_float(w: Tensor, block: int = 64, double: bool = True) -> Tensor:
    """Quantize weights to NF4 and dequantize them.

    The arithmetic is float32. Each row is cut into blocks of inputs with one scale (the block's absmax) each.
    bitsandbytes cuts the flattened matrix instead, which gives the same blocks if `block` divides the width.

    Args:
        w: [out, in], any floating dtype.
        block: inputs per block; the last block of a row is shorter if `block` does not divide the width.
        double: whether the blocks' scales are quantized too, see `double_quantize`.

    Returns:
        A tensor of w's shape and dtype.
    """
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    levels = nf4_levels().to(w.device)
    for (codes, scale), target in zip(normal_codes(w, block, double), grouped(out, block), strict=True):
        target.copy_(levels[codes] * scale.unsqueeze(-1))
    return out


def normal_codes(w: Tensor, block: int, double: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """The indices of the levels [R, G, block] that values are rounded to, and the scales of the blocks [R, G].

    Args:
        w: [R, in].
        block: inputs per block. If it does not divide the width, the shorter last blocks come in a second pair.
        double: whether the scales are quantized too.
    """
    parts = grouped(w, block)
    absmaxes = [part.float().abs().amax(dim=-1) for part in parts]
    scales = absmaxes
    if double:
        scales = list(double_quantize(torch.cat(absmaxes, dim=1)).split([each.shape[1] for each in absmaxes], dim=1))
    levels = nf4_levels().to(w.device)
    for part, absmax, scale in zip(parts, absmaxes, scales, strict=True):
        unit = part.float() / torch.where(absmax == 0, 1, absmax).unsqueeze(-1)
        yield _nearest_index(unit, levels), scale


def nf4_levels() -> Tensor:
    """The 16 levels of NF4 in ascending order from -1 to 1: 8 positive quantiles, 7 negative ones, and zero."""
    return torch.tensor(NF4, dtype=torch.float32)


def double_quantize(scales: Tensor) -> Tensor:
    """Quantize the scales of blocks to 8 bits and dequantize them (double quantization in QLoRA).

    The mean of all scales is subtracted first. Then each block of 256 scales is divided by its absmax and rounded to
    `dynamic_levels`.

    Args:
        scales: float32 of any shape.

    Returns:
        The dequantized scales, in the same shape.
    """
    mean = scales.mean()
    flat = (scales - mean).flatten()
    code = dynamic_levels().to(scales.device)
    out = []
    for part in flat.split(BLOCK_OF_SCALES):
        absmax = part.abs().max()
        unit = part / torch.where(absmax == 0, 1, absmax)
        out.append(_nearest(unit, code) * absmax)
    return torch.cat(out).view_as(scales) + mean


@functools.cache
def dynamic_levels() -> Tensor:
    """The 256 values of the signed dynamic 8-bit data type in ascending order (Dettmers, ICLR 2016).

    They cover seven decades on each side of zero, with 2^i fractions in decade i (0 to 6), plus zero and one.
    """
    positive: list[float] = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float64)
        positive += ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
    return torch.tensor([*(-v for v in positive), 0.0, *positive, 1.0], dtype=torch.float64).sort().values.float()


def _nearest(x: Tensor, code: Tensor) -> Tensor:
    """The value of `code` [C], ascending, that is nearest to each element of x; the lower one of two equally near."""
    return code[_nearest_index(x, code)]


def _nearest_index(x: Tensor, code: Tensor) -> Tensor:
    """Index of `_nearest` in the code."""
    above = torch.searchsorted(code, x.contiguous()).clamp(1, len(code) - 1)
    return torch.where(x - code[above - 1] <= code[above] - x, above - 1, above)
