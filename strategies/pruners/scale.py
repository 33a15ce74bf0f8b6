"""Scores on the scale of the relevance that they were made from, for methods that reckon with its values."""

from torch import Tensor

from qapbench import min_max


def on_the_scale_of(relevance: Tensor, scores: Tensor) -> Tensor:
    """Undo the min-max normalisation of scores: [B, N], not negative.

    Without a sensitivity the scores are the normalised relevance, and the result is the relevance to the bit.

    Args:
        relevance: [B, N] the pruner's relevance, not negative.
        scores: [B, N] the scores that `choose` gets: the normalised relevance, fused with sensitivity if there is one.
    """
    relevance = relevance.float()
    low, high = relevance.aminmax(dim=-1, keepdim=True)
    return (relevance + (scores - min_max(relevance)) * (high - low)).clamp(min=0)
