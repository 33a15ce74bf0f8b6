"""What simulated quantization does to a token: s_i = ||x_i - Q(x_i)||_2."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from qapbench import Bits, GroupSize, metric, quantizers


def quantization_error(tokens: Tensor, quantizer: str, **params: object) -> Tensor:
    """L2 norm per token of the residual that the named quantizer leaves: [B, N, D] -> [B, N]."""
    return (tokens - quantizers.create(quantizer, **params)(tokens)).norm(dim=-1)


@metric("absmax_error")
def absmax_error(tokens: Tensor, bits: Bits = 4) -> Tensor:
    """Residual of token-wise AbsMax quantization."""
    return quantization_error(tokens, "absmax", bits=bits)


@metric("clip_error")
def clip_error(tokens: Tensor, bits: Bits = 4, percentile: Annotated[float, Field(gt=0, le=100)] = 99.0) -> Tensor:
    """Residual of AbsMax quantization clipped at a percentile of |x|."""
    return quantization_error(tokens, "clip", bits=bits, percentile=percentile)


@metric("group_error")
def group_error(tokens: Tensor, bits: Bits = 4, group_size: GroupSize = 128, symmetric: bool = True) -> Tensor:
    """Residual of group-wise quantization."""
    return quantization_error(tokens, "groupwise", bits=bits, group_size=group_size, symmetric=symmetric)
