"""Group-wise AbsMax, or min-max."""

from dataclasses import dataclass

from torch import Tensor

from qapbench import Bits, GroupSize, fake_quantize, quantizer


@quantizer("groupwise")
@dataclass(frozen=True)
class GroupWise:
    """One scale per group of channels of a token; the last group is shorter where the size does not divide.

    Symmetric is QAPruner's "group-wise AbsMax"; asymmetric spans [min, max] with an integer zero point.
    """

    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.bits, self.group_size, self.symmetric)
