"""Norms of a token: the sensitivity of QAPruner's released code is the L2 norm."""

from torch import Tensor

from qapbench import metric


@metric("l1")
def l1(tokens: Tensor) -> Tensor:
    """s_i = sum_d |x_id|."""
    return tokens.abs().sum(dim=-1)


@metric("l2")
def l2(tokens: Tensor) -> Tensor:
    """s_i = sqrt(sum_d x_id^2)."""
    return tokens.norm(dim=-1)


@metric("linf")
def linf(tokens: Tensor) -> Tensor:
    """s_i = max_d |x_id|."""
    return tokens.abs().amax(dim=-1)
