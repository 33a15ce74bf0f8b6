"""Clipped AbsMax."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from qapbench import Bits, fake_quantize, quantizer


@quantizer("clip")
@dataclass(frozen=True)
class Clip:
    """AbsMax after clipping each token at a percentile of its own |x| over channels (linear interpolation)."""

    bits: Bits = 4
    percentile: Annotated[float, Field(gt=0, le=100)] = 99.0

    def __call__(self, x: Tensor) -> Tensor:
        values = x.float()
        bound = torch.quantile(values.abs(), self.percentile / 100, dim=-1, keepdim=True)
        return fake_quantize(values.clamp(-bound, bound), self.bits, symmetric=True).to(x.dtype)
