"""Sensitivity metrics that simulate quantization and measure what a token loses: s_i = ||x_i - Q(x_i)||_2."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from qapbench import Bits, GroupSize, metric, quantizers


def quantization_error(tokens: Tensor, quantizer: str, **params: object) -> Tensor:
    """Compute the L2 norm of what quantization takes from each token: [B, N, D] -> [B, N].

    Args:
        tokens: [B, N, D] visual tokens.
        quantizer: name of a registered quantizer.
        **params: the quantizer's parameters.
    """
    return (tokens - quantizers.create(quantizer, **params)(tokens)).norm(dim=-1)


@metric("absmax_error")
def absmax_error(tokens: Tensor, bits: Bits = 4) -> Tensor:
    """Compute the L2 error of token-wise AbsMax quantization: [B, N, D] -> [B, N].

    Args:
        tokens: [B, N, D] visual tokens.
        bits: bits per value in the simulated quantization. The paper quantizes to 4.

    Source:
        QAPruner (arXiv 2604.02816), Table 2.
    """
    return quantization_error(tokens, "absmax", bits=bits)


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
    return quantization_error(tokens, "clip", bits=bits, percentile=percentile)


@metric("group_error")
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
    return quantization_error(tokens, "groupwise", bits=bits, group_size=group_size, symmetric=symmetric)
