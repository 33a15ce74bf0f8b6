"""Token-wise AbsMax quantization."""

from dataclasses import dataclass

from torch import Tensor

from qapbench import Bits, fake_quantize, quantizer


@quantizer("absmax")
@dataclass(frozen=True)
class AbsMax:
    """Quantize each token with one symmetric scale, s = max|x| / (2^(bits-1) - 1): [..., D] -> [..., D].

    The level of a value x is round(x / s).

    Attributes:
        bits: bits per value. QAPruner quantizes to 4.

    Source:
        The usual definition. QAPruner (arXiv 2604.02816), Table 2, has it as token-wise AbsMax.
    """

    bits: Bits = 4

    def __call__(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.bits, symmetric=True)
