"""The six kinds of strategy: their base classes, registries and decorators."""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from qapbench.errors import UserError

from .quantization import PTQ
from .reads import FirstReads
from .registry import Entry, Registry
from .tokens import RelevanceSign, Selection, VisionTokens, all_finite

Bits = Annotated[int, Field(ge=2, le=16, description="bits per value")]
"""Annotation of a parameter that is a number of bits per value, 2 to 16."""
GroupSize = Annotated[int, Field(ge=1, description="channels that share one scale")]
"""Annotation of a parameter that is a number of channels sharing one scale, at least 1."""
Fraction = Annotated[float, Field(ge=0, le=1)]
"""Annotation of a parameter that is a number from 0 to 1."""

# Added to numerator and denominator of the min-max normalisation, as in QAPruner's code.
EPSILON = 1e-6

Allocation = Callable[[Tensor, Sequence[int], Sequence[int], float], list[int]]
"""Choice of bits for layers: (errors [L, B], the B numbers of bits, weights of each layer, mean bits per weight) -> for
each layer the index of its number of bits."""
Metric = Callable[[Tensor], Tensor]
"""Sensitivity of tokens to quantization: [B, N, D] -> [B, N], higher means more sensitive."""
Fusion = Callable[[Tensor, Tensor], Tensor]
"""Combination of relevance and sensitivity, each [B, N] in [0, 1], into one score [B, N] that is not negative."""


Scoring = TypeVar("Scoring", bound=Callable[..., Tensor])
TOGETHER = 2**20  # values of several images that a metric scores in one call, at most: no more calls are saved by more


def batched(scoring: Scoring) -> Scoring:
    """Decorator of a metric or a fusion whose scores of an image keep their bits if others are scored in the same call.

    That is so if it only adds, multiplies, divides and compares single values, and takes sums and extremes of a token's
    channels and extremes of an image's tokens. It is not if it multiplies matrices or raises to a power. Small images
    then cost fewer calls.
    """
    scoring.batched = True  # type: ignore[attr-defined]
    return scoring


class Quantizer(Protocol):
    """A quantize-dequantize function: [..., D] -> [..., D] in the same dtype. Each row has its own scales."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


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


def _check_finite(x: Tensor, owner: str) -> None:
    if not x.is_floating_point():
        raise UserError(f"{owner}: expected a floating tensor, got {x.dtype}")
    if not all_finite(x):
        raise UserError(f"{owner}: {int((~torch.isfinite(x)).sum())} of {x.numel()} values are not finite")


def _check_scores(scores: Tensor, tokens: VisionTokens, owner: str) -> None:
    if scores.shape != tokens.projected.shape[:2]:
        raise UserError(f"{owner}: expected [{tokens.batch}, {tokens.count}], got {tuple(scores.shape)}")
    _check_finite(scores, owner)


def _normalised(name: str, choices: Sequence[Choice], values: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The scores of several choices, each checked and normalised per image; those of one size in one call.

    Args:
        name: what the scores are, for messages.
        choices: the choices.
        values: for each of them its scores [B, N]; None where there are none.
    """
    together = _joined(values)
    sizes = [one.tokens.projected.shape[:2] for one in choices]
    sized = sizes == [None if value is None else value.shape for value in values]
    if together is not None and sized and together.is_floating_point() and all_finite(together):
        return list(min_max(together.float()).split(len(together) // len(values)))
    found: list[Tensor | None] = []
    for one, value in zip(choices, values, strict=True):
        if value is not None:
            _check_scores(value, one.tokens, name)
        found.append(None if value is None else min_max(value.float()))
    return found


def _joined(values: Sequence[Tensor | None]) -> Tensor | None:
    """Several tensors [B, ...] of one size as one; None if there are not several, or not of one size."""
    given = [value for value in values if value is not None]
    alike = {(value.shape, value.dtype, value.device) for value in given}
    return torch.cat(given) if len(given) == len(values) > 1 == len(alike) else None


class Choice(NamedTuple):
    """What tokens are chosen from, and by what.

    Attributes:
        tokens: a batch of images.
        sensitivity: [B, N] from a metric, on any scale; None chooses by relevance alone.
        relevance: result of `Pruner.relevance(tokens)`, if it was computed before.
    """

    tokens: VisionTokens
    sensitivity: Tensor | None = None
    relevance: Tensor | None = None


class Pruner(abc.ABC):
    """A method that chooses visual tokens.

    Subclasses define how relevant each token is and how tokens are chosen. This class normalises and fuses the scores
    and enforces the budget. Subclasses are frozen dataclasses whose fields are the parameters that a spec can set.

    Attributes:
        needs: fields of `VisionTokens` that the method reads in addition to `projected`.
        optional: those of `needs` that may be missing.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = frozenset()

    @property
    def relevance_sign(self) -> RelevanceSign | None:
        """Sign of the similarity between token and question that counts as relevance.

        A method that measures such a similarity has a parameter of this name, and gives it to
        `VisionTokens.relevance_of`. None for any other method.
        """
        return None

    @property
    def front(self) -> Pruner | None:
        """The method that chooses in front of the decoder: this one. None if tokens are dropped only inside it."""
        return self

    @property
    def front_needs(self) -> frozenset[str]:
        """Fields of `VisionTokens` that are read in front of the decoder."""
        return self.front.needs if self.front else frozenset()

    def entering(self, count: int, keep: int) -> int:
        """Number of a view's tokens that enter the decoder.

        Args:
            count: tokens of the view.
            keep: its budget, at most `count`.
        """
        return keep

    def relevance(self, tokens: VisionTokens) -> Tensor | None:
        """Semantic relevance [B, N] on any scale, higher means keep. None if the method has no such score."""
        return None

    def relevance_each(self, several: Sequence[VisionTokens]) -> Sequence[Tensor | None]:
        """The relevance of several batches of images, for each of them what `relevance` gives.

        A method may override this to work on all of them at the same time. No bit may depend on the others.

        Args:
            several: the batches. Their sizes may differ.
        """
        return [self.relevance(tokens) for tokens in several]

    @abc.abstractmethod
    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        """Choose `keep` tokens per image.

        Args:
            tokens: a batch of images.
            scores: [B, N] from `scores`, not negative.
            keep: kept and merged tokens per image, with 1 <= keep < N.
        """

    def choose_each(self, scored: Sequence[tuple[VisionTokens, Tensor]], keep: int) -> list[Selection]:
        """Choose for several batches of images, for each of them what `choose` does.

        A method may override this to work on all of them at the same time. What is chosen for one must not depend on
        the others, to the last bit.

        Args:
            scored: (tokens, scores) as `choose` gets them. Their sizes may differ.
            keep: kept and merged tokens per image.
        """
        return [self.choose(tokens, scores, keep) for tokens, scores in scored]

    def select(
        self,
        tokens: VisionTokens,
        keep: int,
        sensitivity: Tensor | None = None,
        fusion: Fusion | None = None,
        relevance: Tensor | None = None,
    ) -> Selection:
        """Normalise and fuse the scores, choose tokens, and check the result.

        Args:
            tokens: a batch of images.
            keep: tokens per image that the language model will see, kept and merged ones together.
            sensitivity: [B, N] from a metric, on any scale; None chooses by relevance alone.
            fusion: combines relevance and sensitivity; None stands for the registry's default.
            relevance: result of `relevance(tokens)`, if it was computed before.

        Raises:
            UserError: the budget is out of range, a field is missing, or scores are not finite.
            RuntimeError: the method returned an invalid selection.
        """
        return self.select_each([Choice(tokens, sensitivity, relevance)], keep, fusion)[0]

    def select_each(self, choices: Sequence[Choice], keep: int, fusion: Fusion | None = None) -> list[Selection]:
        """Do for each of several choices what `select` does.

        Args:
            choices: what is chosen from.
            keep: as `select`.
            fusion: as `select`.

        Raises:
            UserError: as `select`.
            RuntimeError: as `select`.
        """
        required = sorted(self.needs - self.optional)
        for one in choices:
            check_budget(keep, one.tokens.count)
            for name in required:
                one.tokens.require(name, type(self).__name__)
        fewer = [one for one in choices if keep < one.tokens.count]
        scored = list(zip((one.tokens for one in fewer), self._scores_each(fewer, fusion), strict=True))
        found = self.choose_each(scored, keep) if scored else []
        together = _joined([one.indices for one in found])
        ordered: Sequence[Tensor | None] = [None] * len(found)
        if together is not None:
            ordered = together.sort(dim=-1).values.split(len(together) // len(found))
        chosen = iter(zip(found, ordered, strict=True))
        return [
            Selection.everything(one.tokens)
            if keep == one.tokens.count
            else self._checked(*next(chosen), one.tokens, keep)
            for one in choices
        ]

    def scores(
        self, tokens: VisionTokens, sensitivity: Tensor | None, fusion: Fusion | None, relevance: Tensor | None = None
    ) -> Tensor:
        """The scores [B, N] that `choose` gets: relevance fused with sensitivity.

        Both are normalised to (0, 1] per image first. If only one of them is given, it is the score; if neither is, all
        scores are 1. The arguments are those of `select`.
        """
        return self._scores_each([Choice(tokens, sensitivity, relevance)], fusion)[0]

    def _scores_each(self, choices: Sequence[Choice], fusion: Fusion | None) -> list[Tensor]:
        """What `scores` gives for each of several choices."""
        relevances = [self.relevance(one.tokens) if one.relevance is None else one.relevance for one in choices]
        semantic = _normalised("relevance", choices, relevances)
        sensitive = _normalised("sensitivity", choices, [one.sensitivity for one in choices])
        fuse = fusion or fusions.create(fusions.default)
        if getattr(fuse, "batched", False):
            every, each = _joined(semantic), _joined(sensitive)
            if every is not None and each is not None:
                fused = fuse(every, each)
                if fused.shape == every.shape and all_finite(fused) and float(fused.amin()) >= 0:
                    return list(fused.split(len(fused) // len(choices)))
        found: list[Tensor] = []
        for one, relevance, sensitivity in zip(choices, semantic, sensitive, strict=True):
            if relevance is None or sensitivity is None:
                only, shown = sensitivity if relevance is None else relevance, one.tokens.projected
                every = shown.new_ones(shown.shape[:2], dtype=torch.float32) if only is None else only
                found.append(every)
                continue
            fused = fuse(relevance, sensitivity)
            _check_scores(fused, one.tokens, "fusion: scores")
            if float(fused.amin()) < 0:
                raise UserError("fusion: scores must not be negative")
            found.append(fused)
        return found

    def _checked(self, chosen: Selection, indices: Tensor | None, tokens: VisionTokens, keep: int) -> Selection:
        """A selection with its indices sorted, or a RuntimeError that names the method and its mistake.

        Args:
            chosen: the selection.
            indices: its indices, sorted; None if they are not sorted yet.
            tokens: what was chosen from.
            keep: how many tokens were asked for.
        """
        indices = chosen.indices.sort(dim=-1).values if indices is None else indices
        method = type(self).__name__
        if chosen.budget != keep or indices.shape[0] != tokens.batch:
            raise RuntimeError(f"{method} kept {chosen.budget} tokens where {keep} were asked for")
        rows = indices.tolist()  # sorted
        if any(row and (row[0] < 0 or row[-1] >= tokens.count) for row in rows):
            raise RuntimeError(f"{method} chose a token outside 0..{tokens.count - 1}")
        if any(len(set(row)) < len(row) for row in rows):
            raise RuntimeError(f"{method} chose a token twice")
        if chosen.updated is not None:
            if chosen.updated.shape[:2] != indices.shape:
                got, wanted = tuple(chosen.updated.shape[:2]), tuple(indices.shape)
                raise RuntimeError(f"{method} updated {got} tokens where it kept {wanted}")
            if not torch.equal(indices, chosen.indices):
                raise RuntimeError(f"{method} updated tokens that are not in ascending order")
        if chosen.made is not None and (chosen.updated is None or chosen.made.shape != indices.shape):
            raise RuntimeError(f"{method} says where it made tokens, but not which")
        return dataclasses.replace(chosen, indices=indices)


class Stage(NamedTuple):
    """One drop inside the decoder.

    Attributes:
        after: number of decoder layers before the drop.
        keep: tokens per image that the drop leaves.
    """

    after: int
    keep: int


class DecoderPruner(Pruner):
    """A method that drops visual tokens between layers of the language model. The first layers see all tokens.

    `select` is called at every stage with the tokens that are left. Their `projected` field holds their hidden states
    at that stage, on which sensitivity is computed; the other fields that `needs` can name are DECODER_FIELDS. The
    layers after a stage see the tokens chosen there, at their original positions. A method that shortens the prompt
    too names in `front` who does, and in `entering` to how many tokens.

    Attributes:
        ahead: whether attention and keys are read in the layer that follows the drop rather than in the one before it.
        counts: what `keep` counts: the tokens that layers after the last drop receive ("last"), or the mean over all
            layers ("mean"), for a method that leaves none in the end.
        DECODER_FIELDS: fields of `VisionTokens` that only the decoder can fill.
        TEXT_FIELDS: those of them that hold something of the prompt's text.
    """

    DECODER_FIELDS: ClassVar[frozenset[str]] = frozenset(
        {
            "query_attention",
            "text_attention",
            "context_attention",
            "rotated_keys",
            "final_states",
            "prompt_embeds",
            "text_keys",
            "text_states",
            "embedded",
        }
    )
    TEXT_FIELDS: ClassVar[frozenset[str]] = frozenset(
        {"query_attention", "text_attention", "prompt_embeds", "text_keys", "text_states"}
    )
    ahead: ClassVar[bool] = False
    counts: ClassVar[Literal["last", "mean"]] = "last"

    @property
    def front(self) -> Pruner | None:
        """The method that shortens the prompt before it enters the decoder; None leaves it whole."""
        return None

    def entering(self, count: int, keep: int) -> int:
        """Number of a view's tokens that enter the decoder; see `Pruner.entering`. They are all, without a `front`."""
        return count

    @abc.abstractmethod
    def stages(self, count: int, keep: int, depth: int) -> list[Stage]:
        """The drops in the order of the layers. The last one keeps `keep` tokens, unless `counts` is "mean".

        Args:
            count: visual tokens per image that enter the decoder.
            keep: tokens per image, counted as `counts` says.
            depth: number of decoder layers, at least two. Every drop comes after 1 to depth - 1 of them.
        """


def even_stages(layers: Sequence[float], count: int, keep: int, depth: int) -> list[Stage]:
    """Make stages that each keep the same fraction of the tokens which the stage before left.

    Stage s of S keeps round(count * (keep / count)^(s / S)) tokens.

    Args:
        layers: number of layers before each stage, rounded and limited to 1 .. depth - 1. If two stages of a shallow
            decoder fall on the same place, the later one counts.
        count: visual tokens per image before the first stage.
        keep: tokens per image after the last stage.
        depth: number of decoder layers.
    """
    places = [min(max(round(layer), 1), depth - 1) for layer in layers]
    budgets = [round(count * (keep / count) ** (step / len(places))) for step in range(1, len(places) + 1)]
    return [Stage(*stage) for stage in dict(zip(places, budgets, strict=True)).items()]


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
        _check_finite(tokens, f"metric '{self.name}': tokens")
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
        _check_finite(scores, f"metric '{self.name}': scores")
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


def _build_metric(entry: Entry[Measure], params: dict[str, Any]) -> Measure:
    if isinstance(entry.target, type):
        metric: Any = entry.target(**params)
        return Measure(entry.name, metric.scores, metric.needs)
    together = getattr(entry.target, "batched", False)
    return Measure(entry.name, functools.partial(entry.target, **params), batched=together)


def _check_metric(target: Any) -> None:
    _check_class(ModelMetric, "metric")(target) if isinstance(target, type) else _check_callable(target)


def _call(entry: Entry[Any], params: dict[str, Any]) -> Any:
    return entry.target(**params)


def _build_fusion(entry: Entry[Fusion], params: dict[str, Any]) -> Fusion:
    fusion = functools.partial(entry.target, **params)
    return batched(fusion) if getattr(entry.target, "batched", False) else fusion


def _build_allocation(entry: Entry[Allocation], params: dict[str, Any]) -> Allocation:
    return functools.partial(entry.target, **params)


def _check_class(base: type, kind: str) -> Callable[[Any], None]:
    def check(target: Any) -> None:
        if not (isinstance(target, type) and issubclass(target, base)):
            raise TypeError(f"a {kind} must be a subclass of qapbench.{base.__name__}, got {target!r}")
        if inspect.isabstract(target):
            lacking = ", ".join(sorted(getattr(target, "__abstractmethods__", ())))
            raise TypeError(f"{target.__name__} is no {kind} yet: it does not define {lacking}")

    return check


def _check_callable(target: Any) -> None:
    usable = callable(target)
    if isinstance(target, type):  # classes are always callable; the instances have to be
        usable = any("__call__" in vars(base) for base in target.__mro__)
    if not usable:
        raise TypeError(f"expected a function or a class with __call__, got {target!r}")


metrics: Registry[Measure] = Registry(
    "metric", _build_metric, _check_metric, lambda of: 0 if isinstance(of, type) else 1
)
"""Registry of sensitivity metrics; an item is called with tokens [B, N, D] and returns scores [B, N]."""
quantizers: Registry[Quantizer] = Registry("quantizer", _call, _check_callable)
"""Registry of quantizers; an item is called with a tensor [..., D] and returns it quantized and dequantized."""
fusions: Registry[Fusion] = Registry("fusion", _build_fusion, _check_callable, positional=2)
"""Registry of fusions; an item is called with relevance and sensitivity [B, N] and returns scores [B, N]."""
pruners: Registry[Pruner] = Registry("pruner", _call, _check_class(Pruner, "pruner"))
"""Registry of pruners; an item is a `Pruner`."""
ptqs: Registry[PTQ] = Registry("ptq", _call, _check_class(PTQ, "ptq"))
"""Registry of PTQ methods; an item is a `PTQ`."""
allocations: Registry[Allocation] = Registry("allocation", _build_allocation, _check_callable, positional=4)
"""Registry of allocations; an item chooses the bits of each layer from errors [L, B]."""

metric = metrics.register
"""Decorator `@metric(name)`: registers a function of tokens, or a `ModelMetric`."""
quantizer = quantizers.register
"""Decorator `@quantizer(name)`: registers a class whose instances quantize and dequantize a tensor."""
fusion = fusions.register
"""Decorator `@fusion(name)`: registers a function of relevance and sensitivity."""
pruner = pruners.register
"""Decorator `@pruner(name)`: registers a subclass of `Pruner`."""
ptq = ptqs.register
"""Decorator `@ptq(name)`: registers a subclass of `PTQ`."""
allocation = allocations.register
"""Decorator `@allocation(name)`: registers a function of errors, bits, sizes and a mean."""
KINDS: dict[str, Registry[Any]] = {r.kind: r for r in (metrics, quantizers, fusions, pruners, ptqs, allocations)}
"""Registry of each kind of strategy, by the kind's name."""
