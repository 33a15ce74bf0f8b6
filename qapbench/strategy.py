"""The kinds of strategy, their registries and decorators, and what their base classes own."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Protocol

import torch
from pydantic import Field
from torch import Tensor

from .errors import UserError
from .quantization import PTQ
from .registry import Entry, Registry
from .tokens import Selection, VisionTokens

Bits = Annotated[int, Field(ge=2, le=16, description="bits per value")]
GroupSize = Annotated[int, Field(ge=1, description="channels that share one scale")]
Share = Annotated[float, Field(ge=0, le=1)]

EPSILON = 1e-6  # as in QAPruner's code: added to numerator and denominator of the min-max normalisation

Metric = Callable[[Tensor], Tensor]
Fusion = Callable[[Tensor, Tensor], Tensor]


class Quantizer(Protocol):
    """Quantize-dequantize: [..., D] -> [..., D] of the same dtype; each row has its own scales."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


def min_max(scores: Tensor) -> Tensor:
    """Each image's scores [B, N] brought to (0, 1]; constant scores become 1."""
    low, high = scores.aminmax(dim=-1, keepdim=True)
    return (scores - low + EPSILON) / (high - low + EPSILON)


def top(scores: Tensor, keep: int) -> Tensor:
    """[B, keep] ascending indices of the highest scores; ties go to the lower index."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[:, :keep].sort(dim=-1).values


def _check_finite(x: Tensor, owner: str) -> None:
    if not x.is_floating_point():
        raise UserError(f"{owner}: expected a floating tensor, got {x.dtype}")
    if not torch.isfinite(x).all():
        raise UserError(f"{owner}: {int((~torch.isfinite(x)).sum())} of {x.numel()} values are not finite")


def _check_scores(scores: Tensor, tokens: VisionTokens, owner: str) -> None:
    if scores.shape != tokens.projected.shape[:2]:
        raise UserError(f"{owner}: expected [{tokens.batch}, {tokens.count}], got {tuple(scores.shape)}")
    _check_finite(scores, owner)


class Pruner(abc.ABC):
    """Chooses visual tokens. Subclasses say what is relevant and how to choose; this class owns the rest.

    Subclasses are frozen dataclasses; their fields are the spec's parameters.

    Attributes:
        needs: fields of VisionTokens that the method reads, beyond `projected`.
        optional: those of `needs` that it can do without; the rest must be there.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = frozenset()

    def relevance(self, tokens: VisionTokens) -> Tensor | None:
        """[B, N] semantic relevance, higher = keep, any scale; None where the method has none."""
        return None

    @abc.abstractmethod
    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        """The selection of `keep` tokens (kept + merged) from scores [B, N], not negative; 1 <= keep < N."""

    def select(
        self, tokens: VisionTokens, keep: int, sensitivity: Tensor | None = None, fusion: Fusion | None = None,
        relevance: Tensor | None = None,
    ) -> Selection:  # fmt: skip
        """Normalise per image, fuse, choose, and enforce the budget.

        Args:
            tokens: a batch of images.
            keep: tokens that the language model will see per image, kept and merged together.
            sensitivity: [B, N] from a metric, any scale; None selects by meaning alone.
            fusion: how the two scores become one; the registry's default where None.
            relevance: what `relevance(tokens)` gave, where it was computed before.

        Raises:
            UserError: the budget is out of range, or scores are not finite.
        """
        if not 1 <= keep <= tokens.count:
            raise UserError(f"keep={keep} is out of range: an image has {tokens.count} tokens (1..{tokens.count})")
        for name in sorted(self.needs - self.optional):
            tokens.require(name, type(self).__name__)
        if keep == tokens.count:
            everything = torch.arange(keep, device=tokens.projected.device)
            return Selection(everything.expand(tokens.batch, keep).contiguous())
        scores = self.scores(tokens, sensitivity, fusion, relevance)
        return self._checked(self.choose(tokens, scores, keep), tokens, keep)

    def scores(
        self, tokens: VisionTokens, sensitivity: Tensor | None, fusion: Fusion | None, relevance: Tensor | None = None
    ) -> Tensor:
        """[B, N] what `choose` gets: relevance, in [0, 1], fused with sensitivity where there is one."""
        semantic = self.relevance(tokens) if relevance is None else relevance
        given = {"relevance": semantic, "sensitivity": sensitivity}
        ready = {}
        for name, values in given.items():
            if values is None:
                continue
            _check_scores(values, tokens, name)
            ready[name] = min_max(values.float())
        if len(ready) == 2:
            fuse = fusion or fusions.create(fusions.default)
            fused = fuse(ready["relevance"], ready["sensitivity"])
            _check_scores(fused, tokens, "fusion: scores")
            if (fused < 0).any():
                raise UserError("fusion: scores must not be negative")
            return fused
        if ready:
            return next(iter(ready.values()))
        return torch.ones(tokens.projected.shape[:2], device=tokens.projected.device)

    def _checked(self, chosen: Selection, tokens: VisionTokens, keep: int) -> Selection:
        """A selection with ascending indices, or a fault of the method, named."""
        indices = chosen.indices.sort(dim=-1).values
        method = type(self).__name__
        if chosen.budget != keep or indices.shape[0] != tokens.batch:
            raise RuntimeError(f"{method} kept {chosen.budget} tokens where {keep} were asked for")
        if indices.numel() and (indices.min() < 0 or indices.max() >= tokens.count):
            raise RuntimeError(f"{method} chose a token outside 0..{tokens.count - 1}")
        if (indices.diff(dim=-1) == 0).any():
            raise RuntimeError(f"{method} chose a token twice")
        if chosen.updated is not None:
            if chosen.updated.shape[:2] != indices.shape:
                got, wanted = tuple(chosen.updated.shape[:2]), tuple(indices.shape)
                raise RuntimeError(f"{method} updated {got} tokens where it kept {wanted}")
            if not torch.equal(indices, chosen.indices):
                raise RuntimeError(f"{method} updated tokens that are not in ascending order")
        return dataclasses.replace(chosen, indices=indices)


def _build_metric(entry: Entry[Metric], params: dict[str, Any]) -> Metric:
    """The metric with its input checked and brought to float32, and its output checked."""

    @functools.wraps(entry.target)
    def measured(tokens: Tensor) -> Tensor:
        if tokens.ndim != 3:
            raise UserError(f"metric '{entry.name}': expected tokens [B, N, D], got {tuple(tokens.shape)}")
        _check_finite(tokens, f"metric '{entry.name}': tokens")
        scores = entry.target(tokens.float(), **params)
        if not isinstance(scores, Tensor) or scores.shape != tokens.shape[:2]:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise UserError(f"metric '{entry.name}': must return [B, N] = {tuple(tokens.shape[:2])}, got {got}")
        _check_finite(scores, f"metric '{entry.name}': scores")
        return scores

    return measured


def _call(entry: Entry[Any], params: dict[str, Any]) -> Any:
    return entry.target(**params)


def _build_fusion(entry: Entry[Fusion], params: dict[str, Any]) -> Fusion:
    return functools.partial(entry.target, **params)


def _check_class(base: type, kind: str) -> Callable[[Any], None]:
    def check(target: Any) -> None:
        if not (isinstance(target, type) and issubclass(target, base)):
            raise TypeError(f"a {kind} must be a subclass of qapbench.{base.__name__}, got {target!r}")

    return check


def _check_callable(target: Any) -> None:
    usable = callable(target)
    if isinstance(target, type):  # a class is callable itself; what counts is whether its instances are
        usable = any("__call__" in vars(base) for base in target.__mro__)
    if not usable:
        raise TypeError(f"expected a function or a class with __call__, got {target!r}")


metrics: Registry[Metric] = Registry("metric", _build_metric, _check_callable, positional=1)
quantizers: Registry[Quantizer] = Registry("quantizer", _call, _check_callable)
fusions: Registry[Fusion] = Registry("fusion", _build_fusion, _check_callable, positional=2)
pruners: Registry[Pruner] = Registry("pruner", _call, _check_class(Pruner, "pruner"))
ptqs: Registry[PTQ] = Registry("ptq", _call, _check_class(PTQ, "ptq"))

metric, quantizer, fusion, pruner, ptq = (
    metrics.register, quantizers.register, fusions.register, pruners.register, ptqs.register,
)  # fmt: skip
KINDS: dict[str, Registry[Any]] = {r.kind: r for r in (metrics, quantizers, fusions, pruners, ptqs)}
