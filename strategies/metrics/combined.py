"""QAPruner's combined sensitivity metric."""

from torch import Tensor

from qapbench import Bits, GroupSize, batched, metric, min_max

from .quantization_error import group_error
from .spread import outlier_intensity


@metric("combined")
@batched
def combined(tokens: Tensor, bits: Bits = 4, group_size: GroupSize = 128) -> Tensor:
    """Add the group-wise quantization error and the outlier intensity of each token: [B, N, D] -> [B, N].

    Each of the two is first min-max normalised to (0, 1] over the tokens of its image, and both have the same weight.

    Args:
        tokens: [B, N, D] visual tokens.
        bits: bits per value in the simulated quantization. The paper quantizes to 4.
        group_size: consecutive channels of a token that share one scale. The paper's groups have 128.

    Source:
        QAPruner (arXiv 2604.02816), Table 2: the paper's own metric.
    """
    return min_max(group_error(tokens, bits, group_size)) + min_max(outlier_intensity(tokens))
