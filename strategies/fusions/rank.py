"""Fusion of orders instead of values."""

import torch
from torch import Tensor

from qapbench import Fraction, fusion, min_max


@fusion("rank")
def rank(relevance: Tensor, sensitivity: Tensor, semantic: Fraction = 0.7) -> Tensor:
    """Order tokens by semantic * rank(relevance) + (1 - semantic) * rank(sensitivity); give the relevance values
    out again in that order.

    Handing out the relevance's own values keeps its distribution, so that a pruner that multiplies by the score
    (CDPruner) sees the same scale, and `semantic=1` changes nothing. Equal values share their mean rank; ties in
    the fused order go to the lower index. Where relevance tells no tokens apart it has no values to hand out, and
    is scaled by the fused ranks instead.
    """
    fused = semantic * _mean_rank(relevance) + (1 - semantic) * _mean_rank(sensitivity)
    order = fused.argsort(dim=-1, descending=True, stable=True)
    values = relevance.sort(dim=-1, descending=True).values
    handed = relevance.new_empty(relevance.shape).scatter_(-1, order, values)
    return torch.where(values[..., :1] > values[..., -1:], handed, relevance * min_max(fused))


def _mean_rank(scores: Tensor) -> Tensor:
    """[B, N] rank of each score from below; equal scores get the mean of the ranks that they span."""
    ordered = scores.sort(dim=-1).values
    below, through = (torch.searchsorted(ordered, scores.contiguous(), right=right) for right in (False, True))
    return (below + through - 1).to(scores.dtype) / 2
