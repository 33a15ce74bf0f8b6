"""How a token's channels spread: wide tokens stretch the scale that their channels share."""

from torch import Tensor

from qapbench import metric


@metric("variance")
def variance(tokens: Tensor) -> Tensor:
    """s_i = mean_d (x_id - mean_d x_id)^2, over channels, without Bessel's correction."""
    return tokens.var(dim=-1, correction=0)


@metric("outlier_intensity")
def outlier_intensity(tokens: Tensor) -> Tensor:
    """s_i = max_d x_id - min_d x_id (QAPruner's outlier intensity)."""
    low, high = tokens.aminmax(dim=-1)
    return high - low
