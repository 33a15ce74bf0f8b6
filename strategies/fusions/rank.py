"""A fusion that combines the order of tokens instead of their scores."""

import torch
from torch import Tensor

from qapbench import Fraction, fusion, min_max


@fusion("rank")
def rank(relevance: Tensor, sensitivity: Tensor, semantic: Fraction = 0.7) -> Tensor:
    """Order the tokens by a mix of their two ranks, and hand out the relevance values in that order: [B, N].

    Tokens are ordered by semantic * rank(relevance) + (1 - semantic) * rank(sensitivity). The first token in this order
    then gets the highest relevance value of its image, and so on. The distribution of the relevance is kept in this
    way: a pruner that multiplies by the score, such as CDPruner, sees the same scale, and `semantic=1` changes nothing.

    Equal values share the mean of their ranks. Ties in the fused order go to the lower index. If relevance is the same
    for all tokens of an image, there are no different values to hand out, and it is scaled by the min-max normalised
    fused ranks instead.

    Args:
        relevance: [B, N] in (0, 1], normalised per image.
        sensitivity: [B, N] in (0, 1], normalised per image.
        semantic: weight of the relevance's rank; the sensitivity's rank has 1 - semantic. The default is QAPruner's
            weight for scores.

    Source:
        No paper. A fusion of this benchmark.
    """
    fused = semantic * _mean_rank(relevance) + (1 - semantic) * _mean_rank(sensitivity)
    order = fused.argsort(dim=-1, descending=True, stable=True)
    values = relevance.sort(dim=-1, descending=True).values
    handed = relevance.new_empty(relevance.shape).scatter_(-1, order, values)
    return torch.where(values[..., :1] > values[..., -1:], handed, relevance * min_max(fused))


def _mean_rank(scores: Tensor) -> Tensor:
    """Rank the scores [B, N] of each image, from 0 for the lowest. Equal scores get the mean of their ranks."""
    ordered = scores.sort(dim=-1).values
    below, through = (torch.searchsorted(ordered, scores.contiguous(), right=right) for right in (False, True))
    return (below + through - 1).to(scores.dtype) / 2
