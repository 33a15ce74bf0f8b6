"""The arithmetic that all fake quantization here rests on: uniform levels, one scale per group."""

from __future__ import annotations

import torch
from torch import Tensor


def fake_quantize(x: Tensor, bits: int, group_size: int | None = None, symmetric: bool = False) -> Tensor:
    """Quantize and dequantize along the last dimension, in float32, returned in x's dtype.

    Symmetric: scale = absmax / (2^(b-1) - 1), levels -(2^(b-1)-1) .. 2^(b-1)-1.
    Asymmetric: range [min(x, 0), max(x, 0)] over 2^b levels with an integer zero point, as integer kernels and
    compressed-tensors / torchao have it. Rounding is half to even. A group of one repeated value is exact.

    Args:
        x: [..., D], any floating dtype. Rows never share a scale.
        bits: number of bits, at least 2.
        group_size: channels that share a scale; None is the whole row. Where it does not divide D the last
            group is shorter.
    """
    width = x.shape[-1]
    group = min(group_size or width, width)
    quantize = _symmetric if symmetric else _asymmetric
    body = width - width % group
    values = x.float()
    out = quantize(values[..., :body].unflatten(-1, (-1, group)), bits).flatten(-2)
    if body < width:
        out = torch.cat([out, quantize(values[..., body:], bits)], dim=-1)
    if x.dtype == torch.float16:  # the level above its largest value is infinite: take the value instead
        largest = torch.finfo(x.dtype).max
        out = torch.where(out.isinf(), out, out.clamp(-largest, largest))
    return out.to(x.dtype)


def _symmetric(x: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = torch.maximum(-low, high) / top
    levels = x.div(_nonzero(scale)).round_().clamp_(-top, top)
    return torch.where(low == high, x, levels.mul_(scale))


def _asymmetric(x: Tensor, bits: int) -> Tensor:
    top = 2**bits - 1
    low, high = x.aminmax(dim=-1, keepdim=True)
    floor = low.clamp(max=0)
    scale = (high.clamp(min=0) - floor) / top
    safe = _nonzero(scale)
    zero = floor.div(safe).neg_().round_()
    levels = x.div(safe).round_().add_(zero).clamp_(0, top)
    return torch.where(low == high, x, levels.sub_(zero).mul_(scale))


def _nonzero(scale: Tensor) -> Tensor:
    """A group of zeros has scale 0; dividing by 1 instead keeps it at zero without a NaN."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
