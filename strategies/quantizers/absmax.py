"""Token-wise AbsMax."""

from dataclasses import dataclass

from torch import Tensor

from qapbench import Bits, fake_quantize, quantizer


@quantizer("absmax")
@dataclass(frozen=True)
class AbsMax:
    """One symmetric scale per token: q = round(x / s), s = max|x| / (2^(b-1) - 1)."""

    bits: Bits = 4

    def __call__(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.bits, symmetric=True)
