"""Sensitivity metrics that measure how far a token's channels spread: the wider, the coarser the scale they share."""

from torch import Tensor

from qapbench import batched, metric


@metric("variance")
@batched
def variance(tokens: Tensor) -> Tensor:
    """Compute the variance of each token, s_i = mean_d (x_id - mean_d x_id)^2: [B, N, D] -> [B, N].

    The mean is over the D channels, without Bessel's correction.

    Args:
        tokens: [B, N, D] visual tokens.

    Source:
        QAPruner (arXiv 2604.02816), Table 2.
    """
    return tokens.var(dim=-1, correction=0)


@metric("outlier_intensity")
@batched
def outlier_intensity(tokens: Tensor) -> Tensor:
    """Compute the range of each token's channels, s_i = max_d x_id - min_d x_id: [B, N, D] -> [B, N].

    Args:
        tokens: [B, N, D] visual tokens.

    Source:
        QAPruner (arXiv 2604.02816), Table 2: the paper's outlier intensity.
    """
    return tokens.amax(dim=-1) - tokens.amin(dim=-1)  # vectorised on a CPU, as aminmax is not
