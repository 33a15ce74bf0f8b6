"""Scores of tokens: their checks, their normalisation, and the choice of the highest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from qapbench.errors import UserError

from .tokens import all_finite

# Added to numerator and denominator of the min-max normalisation, as in QAPruner's code.
EPSILON = 1e-6

Scoring = TypeVar("Scoring", bound=Callable[..., Tensor])


def batched(scoring: Scoring) -> Scoring:
    """Decorator of a metric or a fusion whose scores of an image keep their bits if others are scored in the same call.

    That is so if it only adds, multiplies, divides and compares single values, and takes sums and extremes of a token's
    channels and extremes of an image's tokens. It is not if it multiplies matrices or raises to a power. Small images
    then cost fewer calls.
    """
    scoring.batched = True  # type: ignore[attr-defined]
    return scoring


def min_max(scores: Tensor) -> Tensor:
    """Normalise the scores [B, N] of each image to (0, 1]. Constant scores become 1."""
    # amin and amax are vectorised on a CPU; aminmax is not.
    low, high = scores.amin(dim=-1, keepdim=True), scores.amax(dim=-1, keepdim=True)
    return (scores - low + EPSILON) / (high - low + EPSILON)


def top_k(scores: Tensor, keep: int) -> Tensor:
    """Indices [B, keep] of the highest scores, ascending. Of equal scores the one with the lower index wins."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[:, :keep].sort(dim=-1).values


def check_budget(keep: int, count: int) -> None:
    """Check that `keep` is between 1 and `count`, the number of tokens per image.

    Raises:
        UserError: it is not.
    """
    if not 1 <= keep <= count:
        raise UserError(f"keep={keep} is out of range: an image has {count} tokens (1..{count})")


def check_finite(x: Tensor, owner: str) -> None:
    """Check that a tensor is floating and that all its values are finite.

    Args:
        x: the tensor.
        owner: what it is, for the message.

    Raises:
        UserError: it is not.
    """
    if not x.is_floating_point():
        raise UserError(f"{owner}: expected a floating tensor, got {x.dtype}")
    if not all_finite(x):
        raise UserError(f"{owner}: {int((~torch.isfinite(x)).sum())} of {x.numel()} values are not finite")


def check_scores(scores: Tensor, shown: Tensor, owner: str) -> None:
    """Check that scores are a finite number for each token.

    Args:
        scores: the scores, which should be [B, N].
        shown: the tokens [B, N, D].
        owner: what they are, for the message.

    Raises:
        UserError: they are not.
    """
    if scores.shape != shown.shape[:2]:
        raise UserError(f"{owner}: expected {list(shown.shape[:2])}, got {tuple(scores.shape)}")
    check_finite(scores, owner)


def joined(values: Sequence[Tensor | None]) -> Tensor | None:
    """Several tensors [B, ...] of one size as one; None if there are not several, or not of one size."""
    given = [value for value in values if value is not None]
    alike = {(value.shape, value.dtype, value.device) for value in given}
    return torch.cat(given) if len(given) == len(values) > 1 == len(alike) else None
