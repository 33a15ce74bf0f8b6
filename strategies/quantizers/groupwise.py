"""Quantization with one scale per group of channels."""

from dataclasses import dataclass

from torch import Tensor

from qapbench import Bits, GroupSize, fake_quantize, quantizer


@quantizer("groupwise")
@dataclass(frozen=True)
class GroupWise:
    """Quantize each group of consecutive channels of a token with its own scale: [..., D] -> [..., D].

    If the group size does not divide D, the last group of a token is shorter.

    Attributes:
        bits: bits per value. QAPruner quantizes to 4.
        group_size: consecutive channels that share one scale. QAPruner's groups have 128.
        symmetric: whether levels are symmetric around zero, which is QAPruner's group-wise AbsMax. Otherwise they span
            the range of the group, widened to contain zero, and have an integer zero point.

    Source:
        The usual definition. QAPruner (arXiv 2604.02816), Table 2, has it as group-wise AbsMax.
    """

    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.bits, self.group_size, self.symmetric)
