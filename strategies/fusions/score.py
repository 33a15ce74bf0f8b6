"""Fusions that combine the values of relevance and sensitivity, each already normalised to (0, 1] per image."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from qapbench import Fraction, batched, fusion

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@fusion("convex", default=True)
@batched
def convex(relevance: Tensor, sensitivity: Tensor, semantic: Fraction = 0.7) -> Tensor:
    """Compute the weighted mean semantic * relevance + (1 - semantic) * sensitivity, [B, N].

    Args:
        relevance: [B, N] in (0, 1].
        sensitivity: [B, N] in (0, 1].
        semantic: weight of the relevance; the sensitivity has 1 - semantic. QAPruner's code weights them 0.7 and 0.3.

    Source:
        QAPruner (arXiv 2604.02816), released code.
    """
    return semantic * relevance + (1 - semantic) * sensitivity


@fusion("add")
@batched
def add(relevance: Tensor, sensitivity: Tensor, weight: Weight = 1.0) -> Tensor:
    """Compute the sum relevance + weight * sensitivity, [B, N].

    Args:
        relevance: [B, N] in (0, 1].
        sensitivity: [B, N] in (0, 1].
        weight: factor of the sensitivity. 0 leaves the relevance alone.

    Source:
        No paper. The usual definition.
    """
    return relevance + weight * sensitivity


@fusion("multiply")
def multiply(relevance: Tensor, sensitivity: Tensor, weight: Weight = 1.0) -> Tensor:
    """Compute the product relevance * sensitivity^weight, [B, N].

    Args:
        relevance: [B, N] in (0, 1].
        sensitivity: [B, N] in (0, 1].
        weight: exponent of the sensitivity. 0 leaves the relevance alone.

    Source:
        No paper. The usual definition.
    """
    return relevance * sensitivity**weight
