"""Sensitivity metrics that simulate quantization and measure what a token loses: s_i = ||x_i - Q(x_i)||_2."""

from collections.abc import Callable
from typing import Annotated

from pydantic import Field
from torch import Tensor

from qapbench import Bits, GroupSize, batched, metric

# The classes are imported, not looked up by name: a run's identity follows imports, so an edit of a quantizer makes the
# results of these metrics stale.
from qapbench.strategies.quantizers.absmax import AbsMax
from qapbench.strategies.quantizers.clip import Clip
from qapbench.strategies.quantizers.groupwise import GroupWise


def quantization_error(tokens: Tensor, quantizer: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute the L2 norm of what quantization takes from each token: [B, N, D] -> [B, N].

    Args:
        tokens: [B, N, D] visual tokens.
        quantizer: quantizes and dequantizes the tokens: [B, N, D] -> [B, N, D].
    """
    return (tokens - quantizer(tokens)).norm(dim=-1)


@metric("absmax_error")
@batched
def absmax_error(tokens: Tensor, bits: Bits = 4) -> Tensor:
    """Compute the L2 error of token-wise AbsMax quantization: [B, N, D] -> [B, N].

    Args:
        tokens: [B, N, D] visual tokens.
        bits: bits per value in the simulated quantization. The paper quantizes to 4.

    Source:
        QAPruner (arXiv 2604.02816), Table 2.
    """
    return quantization_error(tokens, AbsMax(bits))


@metric("clip_error")
def clip_error(tokens: Tensor, bits: Bits = 4, percentile: Annotated[float, Field(gt=0, le=100)] = 99.0) -> Tensor:
    """Compute the L2 error of AbsMax quantization after clipping at a percentile of |x|: [B, N, D] -> [B, N].

    The error is that against the unclipped token, so what the clipping cuts off counts too.

    Args:
        tokens: [B, N, D] visual tokens.
        bits: bits per value in the simulated quantization. The paper quantizes to 4.
        percentile: percentile of a token's absolute values above which they are clipped, in percent.

    Source:
        QAPruner (arXiv 2604.02816), Table 2.
    """
    return quantization_error(tokens, Clip(bits, percentile))


@metric("group_error")
@batched
def group_error(tokens: Tensor, bits: Bits = 4, group_size: GroupSize = 128, symmetric: bool = True) -> Tensor:
    """Compute the L2 error of group-wise quantization: [B, N, D] -> [B, N].

    Args:
        tokens: [B, N, D] visual tokens.
        bits: bits per value in the simulated quantization. The paper quantizes to 4.
        group_size: consecutive channels of a token that share one scale. The paper's groups have 128.
        symmetric: whether levels are symmetric around zero, as in the paper's group-wise AbsMax. Otherwise they span
            the range of the group.

    Source:
        QAPruner (arXiv 2604.02816), Table 2.
    """
    return quantization_error(tokens, GroupWise(bits, group_size, symmetric))
