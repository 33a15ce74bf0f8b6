"""NF4 (Dettmers et al., QLoRA, NeurIPS 2023, section 3): levels at quantiles of a normal distribution."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .affine import grouped

# Table of the paper, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK_OF_SCALES = 256


def normal_float(w: Tensor, block: int = 64, double: bool = True) -> Tensor:
    """Quantize and dequantize weights to NF4, in float32, returned in w's dtype.

    Args:
        w: [out, in]. Each row is cut into blocks of `block` inputs, the last one shorter where it must be. bitsandbytes
            cuts the flattened matrix: the same wherever `block` divides the width.
        double: the blocks' scales are quantized too, as `double_quantize` does.
    """
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    parts = grouped(w, block)
    tops = [part.float().abs().amax(dim=-1) for part in parts]  # [R, G] each
    scales = tops
    if double:
        scales = list(double_quantize(torch.cat(tops, dim=1)).split([top.shape[1] for top in tops], dim=1))
    code = nf4_levels().to(w.device)
    for part, top, scale, target in zip(parts, tops, scales, grouped(out, block), strict=True):
        unit = part.float() / torch.where(top == 0, 1, top).unsqueeze(-1)
        target.copy_(_nearest(unit, code) * scale.unsqueeze(-1))
    return out


def nf4_levels() -> Tensor:
    """[16] ascending from -1 to 1: 8 quantiles on the positive side, 7 on the negative, and zero."""
    return torch.tensor(NF4)


def double_quantize(scales: Tensor) -> Tensor:
    """Scales [...] of blocks, less their mean, to 8 bits in blocks of 256, and back (QLoRA's double quantization)."""
    mean = scales.mean()
    flat = (scales - mean).flatten()
    code = dynamic_levels().to(scales.device)
    out = []
    for part in flat.split(BLOCK_OF_SCALES):
        top = part.abs().max()
        unit = part / torch.where(top == 0, 1, top)
        out.append(_nearest(unit, code) * top)
    return torch.cat(out).view_as(scales) + mean


@functools.cache
def dynamic_levels() -> Tensor:
    """[256] ascending: the signed dynamic 8-bit type (Dettmers, ICLR 2016): 7 decades, 2^i fractions in the i-th."""
    positive: list[float] = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float64)
        positive += ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (decade - 6)).tolist()
    return torch.tensor([*(-v for v in positive), 0.0, *positive, 1.0], dtype=torch.float64).sort().values.float()


def _nearest(x: Tensor, code: Tensor) -> Tensor:
    """The value of code [C], ascending, that is nearest to each of x; the lower one of two."""
    above = torch.searchsorted(code, x.contiguous()).clamp(1, len(code) - 1)
    low, high = code[above - 1], code[above]
    return torch.where(x - low <= high - x, low, high)
