"""Token-wise AbsMax quantization of clipped values."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from qapbench import Bits, fake_quantize, quantizer


@quantizer("clip")
@dataclass(frozen=True)
class Clip:
    """Clip each token at a percentile of its own absolute values, then quantize it like `absmax`: [..., D] -> [..., D].

    The percentile is over the channels of the token and interpolated linearly. A token with a NaN or an
    infinity becomes NaN as a whole, as in `absmax`.

    Attributes:
        bits: bits per value. QAPruner quantizes to 4.
        percentile: percentile of a token's absolute values above which they are clipped, in percent. 100 clips nothing.

    Source:
        The usual definition. QAPruner (arXiv 2604.02816), Table 2, has it as clip AbsMax.
    """

    bits: Bits = 4
    percentile: Annotated[float, Field(gt=0, le=100)] = 99.0

    def __call__(self, x: Tensor) -> Tensor:
        values = x.float()
        bound = torch.quantile(values.abs(), self.percentile / 100, dim=-1, keepdim=True)
        bound = bound.where(values.isfinite().all(dim=-1, keepdim=True), torch.nan)  # an infinity must not be clipped
        return fake_quantize(values.clamp(-bound, bound), self.bits, symmetric=True).to(x.dtype)
