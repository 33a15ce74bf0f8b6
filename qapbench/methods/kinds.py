"""The six kinds of strategy: their registries and decorators. Those of fusions are in `fusing`: pruners use them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol

from pydantic import Field
from torch import Tensor

from .fusing import fusions
from .measure import Measure, ModelMetric
from .pruner import Pruner
from .quantization import PTQ
from .registry import Entry, Registry, check_callable, check_class

Bits = Annotated[int, Field(ge=2, le=16, description="bits per value")]
"""Annotation of a parameter that is a number of bits per value, 2 to 16."""
GroupSize = Annotated[int, Field(ge=1, description="channels that share one scale")]
"""Annotation of a parameter that is a number of channels sharing one scale, at least 1."""
Fraction = Annotated[float, Field(ge=0, le=1)]
"""Annotation of a parameter that is a number from 0 to 1."""

Allocation = Callable[[Tensor, Sequence[int], Sequence[int], float], list[int]]
"""Choice of bits for layers: (errors [L, B], the B numbers of bits, weights of each layer, mean bits per weight) -> for
each layer the index of its number of bits."""


class Quantizer(Protocol):
    """A quantize-dequantize function: [..., D] -> [..., D] in the same dtype. Each row has its own scales."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


def _build_metric(entry: Entry[Measure], params: dict[str, Any]) -> Measure:
    if isinstance(entry.target, type):
        metric: Any = entry.target(**params)
        return Measure(entry.name, metric.scores, metric.needs)
    together = getattr(entry.target, "batched", False)
    return Measure(entry.name, functools.partial(entry.target, **params), batched=together)


def _check_metric(target: Any) -> None:
    check_class(ModelMetric, "metric")(target) if isinstance(target, type) else check_callable(target)


def _call(entry: Entry[Any], params: dict[str, Any]) -> Any:
    return entry.target(**params)


def _build_allocation(entry: Entry[Allocation], params: dict[str, Any]) -> Allocation:
    return functools.partial(entry.target, **params)


metrics: Registry[Measure] = Registry(
    "metric", _build_metric, _check_metric, lambda of: 0 if isinstance(of, type) else 1
)
"""Registry of sensitivity metrics; an item is called with tokens [B, N, D] and returns scores [B, N]."""
quantizers: Registry[Quantizer] = Registry("quantizer", _call, check_callable)
"""Registry of quantizers; an item is called with a tensor [..., D] and returns it quantized and dequantized."""
pruners: Registry[Pruner] = Registry("pruner", _call, check_class(Pruner, "pruner"))
"""Registry of pruners; an item is a `Pruner`."""
ptqs: Registry[PTQ] = Registry("ptq", _call, check_class(PTQ, "ptq"))
"""Registry of PTQ methods; an item is a `PTQ`."""
allocations: Registry[Allocation] = Registry("allocation", _build_allocation, check_callable, positional=4)
"""Registry of allocations; an item chooses the bits of each layer from errors [L, B]."""

metric = metrics.register
"""Decorator `@metric(name)`: registers a function of tokens, or a `ModelMetric`."""
quantizer = quantizers.register
"""Decorator `@quantizer(name)`: registers a class whose instances quantize and dequantize a tensor."""
pruner = pruners.register
"""Decorator `@pruner(name)`: registers a subclass of `Pruner`."""
ptq = ptqs.register
"""Decorator `@ptq(name)`: registers a subclass of `PTQ`."""
allocation = allocations.register
"""Decorator `@allocation(name)`: registers a function of errors, bits, sizes and a mean."""
KINDS: dict[str, Registry[Any]] = {r.kind: r for r in (metrics, quantizers, fusions, pruners, ptqs, allocations)}
"""Registry of each kind of strategy, by the kind's name."""
