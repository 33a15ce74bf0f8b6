"""Sensitivity metrics: what they are written as, and what checks their scores."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from qapbench.errors import UserError

from .reads import FirstReads
from .scores import check_finite

Metric = Callable[[Tensor], Tensor]
"""Sensitivity of tokens to quantization: [B, N, D] -> [B, N], higher means more sensitive."""
TOGETHER = 2**20  # values of several images that a metric scores in one call, at most: no more calls are saved by more


class ModelMetric(abc.ABC):
    """A metric that looks at the language model's first linears as well as at the tokens.

    Subclasses are frozen dataclasses whose fields are the parameters that a spec can set.

    Attributes:
        needs: what it looks at; "first_reads" is all that there is.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"first_reads"})

    @abc.abstractmethod
    def scores(self, tokens: Tensor, reads: FirstReads) -> Tensor:
        """Sensitivity [B, N] of tokens [B, N, D] in float32, higher means more sensitive.

        Args:
            tokens: a batch of images, which must not influence each other.
            reads: how the language model first reads a token.
        """


@dataclasses.dataclass(frozen=True)
class Measure:
    """A configured metric: checks the tokens, converts them to float32, and checks the scores.

    Attributes:
        name: name of the metric.
        target: what scores tokens in float32.
        needs: what it looks at apart from the tokens; empty for most.
        batched: whether several images may be scored in one call, as the decorator `batched` says.
        reads: how the language model first reads a token, where no call says it.
    """

    name: str
    target: Callable[..., Tensor]
    needs: frozenset[str] = frozenset()
    batched: bool = False
    reads: FirstReads | None = None

    def __call__(self, tokens: Tensor, reads: FirstReads | None = None) -> Tensor:
        """Scores [B, N] of tokens [B, N, D].

        Args:
            tokens: a batch of images.
            reads: how the language model first reads a token, for a metric that needs it.

        Raises:
            UserError: a value is not finite, a shape is wrong, or the metric needs a model and none is given.
        """
        if tokens.ndim != 3:
            raise UserError(f"metric '{self.name}': expected tokens [B, N, D], got {tuple(tokens.shape)}")
        check_finite(tokens, f"metric '{self.name}': tokens")
        reads = reads or self.reads
        if self.needs and reads is None:
            raise UserError(f"metric '{self.name}' looks at the language model, and none is given to it here")
        if self.needs and reads is not None:  # the language model may be on another device than the tokens
            scores = self.target(tokens.to(reads.weights[0].device).float(), reads)
        else:
            scores = self.target(tokens.float())
        if not isinstance(scores, Tensor) or scores.shape != tokens.shape[:2]:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise UserError(f"metric '{self.name}': must return [B, N] = {tuple(tokens.shape[:2])}, got {got}")
        check_finite(scores, f"metric '{self.name}': scores")
        return scores.to(tokens.device)

    def each(self, several: Sequence[Tensor]) -> list[Tensor]:
        """The scores of several batches of images, to the bits of a call for each.

        Args:
            several: batches of images, as a call gets one.
        """
        alike = {(one.shape, one.dtype, one.device) for one in several}
        size = max(1, TOGETHER // max(1, several[0].numel())) if self.batched and len(alike) == 1 else 1
        found: list[Tensor] = []
        for at in range(0, len(several), size):
            some = list(several[at : at + size])
            found += self(torch.cat(some)).split(len(some[0])) if len(some) > 1 else [self(some[0])]
        return found
