"""The `prune` section of a spec, `PruneSpec`."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from qapbench.errors import Problem, UserError
from qapbench.methods.decoder_pruner import DecoderPruner
from qapbench.methods.fusing import fusions
from qapbench.methods.kinds import pruners
from qapbench.methods.parameters import problems_of

from .cost_budget import CostBudget, or_cost
from .items import FusionItem, MetricItem, PrunerItem, created, named_item
from .strict import Strict, or_null

MOST_STEPS = 4  # of a schedule that a label shows


class Step(Strict):
    """One drop of a schedule.

    Attributes:
        layer: number of decoder layers before the drop.
        keep: the budget of tokens that the drop leaves, counted as `per` says.
    """

    layer: Annotated[int, Field(ge=1)]
    keep: Annotated[int, Field(ge=1)]


def _keep_or_schedule(schema: dict[str, Any]) -> None:
    """Let the JSON schema of the section do without `keep`, which may follow from its schedule, in place."""
    schema["required"] = [name for name in schema["required"] if name != "keep"]
    schema["anyOf"] = [{"required": ["keep"]}, {"required": ["schedule"]}]


class PruneSpec(Strict):
    """Which visual tokens are kept.

    Attributes:
        method: the pruner.
        keep: the budget of tokens, counted as `per` says. An image or tile with fewer tokens keeps all of them. For a
            pruner inside the decoder, it is the number of tokens that layers after the last drop receive, or the mean
            over layers for a method that leaves none in the end. It may be given as a cost: `{layer_mean: 64}`, or
            `{flops: 0.2}` of the dense prefill, or `{kv_bytes: 50000000}`; `qapbench.costing.budget` finds the number.
        sensitivity: metric whose scores are fused with the pruner's relevance. None lets the pruner select by relevance
            alone.
        fusion: how both scores are combined; the default fusion if there is a sensitivity and this is None.
        per: what `keep` counts if the model cuts images into tiles: tokens of each tile ("tile"), or of all tiles of an
            image together ("image").
        positions: "compact" numbers the shortened sequence anew. "keep" leaves every token its original position, which
            is all that pruners inside the decoder can do. One that shortens the prompt first may number that prompt
            anew. None becomes "keep" for pruners inside the decoder alone and "compact" for all others.
        schedule: for a method inside the decoder, its drops in the place of the method's own: a list of
            `{layer: 2, keep: 128}`, with falling budgets. `keep` is then that of the last one, and may be left out.
        budget: the cost that a spec gives under `keep`; `keep` then says nothing until it is resolved. None if the spec
            gives a number of tokens.
    """

    model_config = ConfigDict(json_schema_extra=_keep_or_schedule)

    method: PrunerItem
    keep: Annotated[int, Field(ge=1, json_schema_extra=or_cost)]
    sensitivity: MetricItem | None = None
    fusion: FusionItem | None = None
    per: Literal["tile", "image"] = "tile"
    positions: Literal["compact", "keep"] | None = None
    schedule: tuple[Step, ...] = Field(default=(), json_schema_extra=or_null)
    budget: SkipJsonSchema[CostBudget | None] = None

    @model_validator(mode="before")
    @classmethod
    def _by_method(cls, data: Any) -> Any:
        """Fill in the default fusion and the default positions, and take a cost for what it is."""
        if not isinstance(data, dict):
            return data
        if "budget" in data:
            raise UserError(Problem("unknown field; a cost stands under `keep`", ("budget",)))
        steps = data.get("schedule") or ()
        filled = {**data, "schedule": tuple(steps) if isinstance(steps, list) else steps}
        last = steps[-1] if isinstance(steps, list | tuple) and steps else None
        if last is not None and data.get("keep") is None:
            filled["keep"] = last.keep if isinstance(last, Step) else last.get("keep") if isinstance(last, dict) else 1
        if isinstance(data.get("keep"), dict) and last is not None:
            message = "a cost and a `schedule` both say how many tokens each layer gets; leave one of them out"
            raise UserError(Problem(message, ("keep",)))
        if isinstance(data.get("keep"), dict):
            try:
                filled |= {"budget": CostBudget.model_validate(data["keep"]), "keep": 1}
            except ValidationError as error:
                raise UserError([one.under("keep") for one in problems_of(error, CostBudget)]) from None
        if filled.get("sensitivity") is not None and filled.get("fusion") is None:
            filled["fusion"] = fusions.default
        method = named_item(pruners, data, "method")
        if method is not None and filled.get("positions") is None:
            filled["positions"] = "keep" if method.front is None else "compact"
        return filled

    @model_serializer(mode="wrap")
    def _as_written(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain data, with a cost under `keep`, where the spec has it."""
        data: dict[str, Any] = dump(self)
        data.pop("budget", None)
        if not self.schedule:
            data.pop("schedule", None)
        return data | {"keep": self.budget.given} if self.budget else data

    @model_validator(mode="after")
    def _consistent(self) -> PruneSpec:
        if self.fusion is not None and self.sensitivity is None:
            raise ValueError("`fusion` without `sensitivity`: name the sensitivity metric to fuse")
        self._check_schedule()
        if self.positions == "compact" and created(pruners, self.method).front is None:
            raise ValueError(
                f"`positions: compact` cannot be had of {self.method}: it drops tokens inside the decoder, whose first "
                "layers have placed them already"
            )
        return self

    def _check_schedule(self) -> None:
        """Check that the method drops tokens inside the decoder, and that layers rise and budgets fall."""
        if not self.schedule:
            return
        if not isinstance(created(pruners, self.method), DecoderPruner):
            inside = [name for name in pruners.names() if issubclass(pruners.entry(name).target, DecoderPruner)]  # type: ignore[arg-type]
            raise UserError(
                Problem(
                    f"{self.method} chooses tokens in front of the decoder, so that all layers get as many; leave it "
                    f"out, or take a method that drops them between layers: {', '.join(inside)}",
                    ("schedule",),
                )
            )
        for index, (one, after) in enumerate(itertools.pairwise(self.schedule), 1):
            for name, fine in (("layer", one.layer < after.layer), ("keep", one.keep > after.keep)):
                if not fine:
                    word = "a later layer" if name == "layer" else "fewer tokens"
                    message = f"each drop has {word} than the one before ({getattr(one, name)})"
                    raise UserError(Problem(message, ("schedule", index, name)))
        if self.keep != self.schedule[-1].keep:
            message = f"the last drop of the schedule leaves {self.schedule[-1].keep}; leave `keep` out"
            raise UserError(Problem(message, ("keep",)))

    @property
    def label(self) -> str:
        """The pruning in words: method, budget, schedule and sensitivity."""
        steps = ", ".join(f"{step.keep} after {step.layer}" for step in self.schedule[:MOST_STEPS])
        more = ", ..." if len(self.schedule) > MOST_STEPS else ""
        schedule = f" ({steps}{more})" if steps else ""
        plus = f" + {self.sensitivity}" if self.sensitivity else ""
        return f"{self.method} {self.budget or self.keep}{schedule}{plus}"
