"""Sensitivity metrics that are norms of a token."""

from torch import Tensor

from qapbench import batched, metric


@metric("l1")
@batched
def l1(tokens: Tensor) -> Tensor:
    """Compute the L1 norm of each token, s_i = sum_d |x_id|: [B, N, D] -> [B, N].

    Args:
        tokens: [B, N, D] visual tokens.

    Source:
        The usual definition of the L1 norm. QAPruner (arXiv 2604.02816), Table 2, compares three norms.
    """
    return tokens.abs().sum(dim=-1)


@metric("l2")
@batched
def l2(tokens: Tensor) -> Tensor:
    """Compute the L2 norm of each token, s_i = sqrt(sum_d x_id^2): [B, N, D] -> [B, N].

    Args:
        tokens: [B, N, D] visual tokens.

    Source:
        The usual definition of the L2 norm. QAPruner (arXiv 2604.02816), Table 2, compares three norms. Its
        released code uses this one as its sensitivity.
    """
    return tokens.norm(dim=-1)


@metric("linf")
@batched
def linf(tokens: Tensor) -> Tensor:
    """Compute the largest absolute value of each token, s_i = max_d |x_id|: [B, N, D] -> [B, N].

    Args:
        tokens: [B, N, D] visual tokens.

    Source:
        The usual definition of the maximum norm. QAPruner (arXiv 2604.02816), Table 2, compares three norms.
    """
    return tokens.abs().amax(dim=-1)
