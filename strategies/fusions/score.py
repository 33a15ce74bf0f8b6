"""Fusions of the two scores themselves, each already in [0, 1] per image."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from qapbench import Fraction, fusion

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@fusion("convex", default=True)
def convex(relevance: Tensor, sensitivity: Tensor, semantic: Fraction = 0.7) -> Tensor:
    """semantic * relevance + (1 - semantic) * sensitivity: 0.7 and 0.3 in QAPruner's code."""
    return semantic * relevance + (1 - semantic) * sensitivity


@fusion("add")
def add(relevance: Tensor, sensitivity: Tensor, weight: Weight = 1.0) -> Tensor:
    """relevance + weight * sensitivity."""
    return relevance + weight * sensitivity


@fusion("multiply")
def multiply(relevance: Tensor, sensitivity: Tensor, weight: Weight = 1.0) -> Tensor:
    """relevance * sensitivity^weight."""
    return relevance * sensitivity**weight
