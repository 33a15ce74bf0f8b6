"""Turns a budget that is a cost into the number of tokens that a method keeps."""

from __future__ import annotations

import functools

from qapbench.errors import Problem, UserError
from qapbench.methods.kinds import pruners
from qapbench.spec.run_spec import PruneSpec, QuantizeSpec

from .amounts import Cost
from .bits import Bits, kv_bytes
from .count import counted
from .flops import decoder_work
from .known import CostedModel
from .prompt import Prompt
from .shape import shape_of
from .tokens import token_flow

WITHIN = 0.01
"""Largest relative difference of what is reached from what is asked."""


def reached(name: str, found: Cost, dense: Cost) -> float:
    """What a cost amounts to, as `CostBudget` counts it.

    Args:
        name: a field of `CostBudget`.
        found: the cost.
        dense: the cost of the same model with every token.
    """
    if name == "flops":
        return (found.flops.prefill + found.flops.selection) / dense.flops.prefill
    return float(getattr(found, name))


def resolved(prune: PruneSpec, model: CostedModel, quantize: QuantizeSpec | None = None) -> PruneSpec:
    """The `prune` section with a number of tokens, whatever it gives.

    It is the number for which the cost of `Prompt`, one image and 64 text tokens, comes nearest to what is asked. A
    method gets the number as if the spec had it, and makes its own parameters of it.

    Args:
        prune: the section.
        model: the model.
        quantize: the `quantize` section, which counts for the KV cache.

    Raises:
        UserError: the method cannot come within one percent of it; the message says what it can.
    """
    asked = prune.budget
    if asked is None:
        return prune
    search = _Search(prune, model, quantize)
    first = search.least(asked.name, asked.value)
    if asked.name == "flops":  # the choice costs much the same for a few tokens more or less
        choosing = search.exact("flops", first) - search.decoder("flops", first)
        first = search.least("flops", asked.value - choosing)
    of = functools.partial(search.exact, asked.name)
    near = [keep for keep in (first - 1, first, first + 1) if 1 <= keep <= search.most]
    best = min(near, key=lambda keep: abs(of(keep) - asked.value))
    if abs(of(best) - asked.value) > WITHIN * asked.value:
        could = ", ".join(f"{of(keep):.4g} with keep {keep}" for keep in near)
        message = f"{prune.method} cannot come within 1 % of {asked} on this model; it has {could}"
        raise UserError(Problem(message, ("prune", "keep", asked.name)))
    return prune.model_copy(update={"keep": best, "budget": None})


class _Search:
    """What a method costs for any number of tokens.

    Args:
        prune: the section.
        model: the model.
        quantize: the `quantize` section.
    """

    def __init__(self, prune: PruneSpec, model: CostedModel, quantize: QuantizeSpec | None) -> None:
        self.prune, self.model, self.quantize, self.prompt = prune, model, quantize, Prompt()
        self.dense = counted(model, quantize)
        self.shape, self.bits = shape_of(model.family), Bits(quantize)
        self.pruner = pruners.create(prune.method.name, **prune.method.params)
        self.outline = model.family.outline(self.prompt.images)
        counts = [view.tokens.count for view in self.outline.encoded.views for _ in range(view.tokens.batch)]
        self.most = sum(counts) if prune.per == "image" else max(counts)

    def keeping(self, keep: int) -> PruneSpec:
        """The section with a number of tokens."""
        return self.prune.model_copy(update={"keep": keep, "budget": None})

    def decoder(self, name: str, keep: int) -> float:
        """What the decoder's part of a cost amounts to, which the choice of tokens is no part of."""
        flow = token_flow(
            self.outline, self.keeping(keep), self.pruner, self.shape.depth, self.model.family.view_tokens
        )
        columns = flow.columns(self.prompt.text)
        if name == "layer_mean":
            return sum(flow.layers) / self.shape.depth
        if name == "kv_bytes":
            return kv_bytes(self.shape, self.bits, columns)
        return decoder_work(self.shape, columns, columns, self.bits, True).flops / self.dense.flops.prefill

    @functools.cache  # noqa: B019 (it lives as long as one search)
    def exact(self, name: str, keep: int) -> float:
        """What a cost amounts to."""
        if name != "flops":
            return self.decoder(name, keep)
        return reached(name, counted(self.model, self.quantize, self.keeping(keep)), self.dense)

    def least(self, name: str, value: float) -> int:
        """The least number of tokens for which the decoder's part reaches a value; all of them if none does."""
        low, high = 1, self.most
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.decoder(name, middle) >= value else (middle + 1, high)
        return low
