"""A fixed grid of levels: ranges taken from one tensor, values of another rounded to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .quantization import Format


@dataclass(frozen=True)
class Grid:
    """Levels (q - zero) * scale for integers q from low to high; the conventions are those of `fake_quantize`.

    Attributes:
        scale, zero: [..., 1], one a group.
        low, high: smallest and largest integer.
    """

    scale: Tensor
    zero: Tensor
    low: int
    high: int

    @classmethod
    def of(cls, x: Tensor, format: Format) -> Grid:
        """The grid of each row of x [..., G]; one row is one group, whatever the format's group size."""
        values = x.float()
        if format.symmetric:
            top = 2 ** (format.bits - 1) - 1
            scale = values.abs().amax(dim=-1, keepdim=True) / top
            return cls(_nonzero(scale), torch.zeros_like(scale), -top, top)
        top = 2**format.bits - 1
        floor = values.amin(dim=-1, keepdim=True).clamp(max=0)
        scale = _nonzero((values.amax(dim=-1, keepdim=True).clamp(min=0) - floor) / top)
        return cls(scale, -(floor / scale).round(), 0, top)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] on the grid of its row, in float32."""
        levels = (x.float() / self.scale).round().add(self.zero).clamp(self.low, self.high)
        return (levels - self.zero) * self.scale


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)
