"""QAPruner's combined sensitivity."""

from torch import Tensor

from qapbench import Bits, GroupSize, metric, min_max

from .quantization_error import group_error
from .spread import outlier_intensity


@metric("combined")
def combined(tokens: Tensor, bits: Bits = 4, group_size: GroupSize = 128) -> Tensor:
    """Group-wise error plus outlier intensity, equal weights, each min-max normalised over the image's tokens."""
    return min_max(group_error(tokens, bits, group_size)) + min_max(outlier_intensity(tokens))
