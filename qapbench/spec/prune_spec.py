"""The `prune` section of a spec, `PruneSpec`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator
from pydantic.json_schema import SkipJsonSchema

from qapbench.errors import Problem, UserError
from qapbench.methods.kinds import DecoderPruner, fusions, pruners
from qapbench.methods.parameters import problems_of

from .cost_budget import CostBudget, or_cost
from .items import FusionItem, MetricItem, PrunerItem, created
from .strict import Strict, named_item


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
            is all that pruners inside the decoder can do. None becomes "keep" for these and "compact" for others.
        budget: the cost that a spec gives under `keep`; `keep` then says nothing until it is resolved. None if the spec
            gives a number of tokens.
    """

    method: PrunerItem
    keep: Annotated[int, Field(ge=1, json_schema_extra=or_cost)]
    sensitivity: MetricItem | None = None
    fusion: FusionItem | None = None
    per: Literal["tile", "image"] = "tile"
    positions: Literal["compact", "keep"] | None = None
    budget: SkipJsonSchema[CostBudget | None] = None

    @model_validator(mode="before")
    @classmethod
    def _by_method(cls, data: Any) -> Any:
        """Fill in the default fusion and the default positions, and take a cost for what it is."""
        if not isinstance(data, dict):
            return data
        if "budget" in data:
            raise UserError(Problem("unknown field; a cost stands under `keep`", ("budget",)))
        filled = dict(data)
        if isinstance(data.get("keep"), dict):
            try:
                filled |= {"budget": CostBudget.model_validate(data["keep"]), "keep": 1}
            except ValidationError as error:
                raise UserError([one.under("keep") for one in problems_of(error, CostBudget)]) from None
        if filled.get("sensitivity") is not None and filled.get("fusion") is None:
            filled["fusion"] = fusions.default
        method = named_item(pruners, data, "method")
        if method is not None and filled.get("positions") is None:
            filled["positions"] = "keep" if isinstance(method, DecoderPruner) else "compact"
        return filled

    @model_serializer(mode="wrap")
    def _as_written(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain data, with a cost under `keep`, where the spec has it."""
        data: dict[str, Any] = dump(self)
        data.pop("budget", None)
        return data | {"keep": self.budget.given} if self.budget else data

    @model_validator(mode="after")
    def _consistent(self) -> PruneSpec:
        if self.fusion is not None and self.sensitivity is None:
            raise ValueError("`fusion` without `sensitivity`: name the sensitivity metric to fuse")
        if self.positions == "compact" and isinstance(created(pruners, self.method), DecoderPruner):
            raise ValueError(
                f"`positions: compact` cannot be had of {self.method}: it drops tokens inside the decoder, whose first "
                "layers have placed them already"
            )
        return self

    @property
    def label(self) -> str:
        """The pruning in words: method, budget and sensitivity."""
        return f"{self.method} {self.budget or self.keep}" + (f" + {self.sensitivity}" if self.sensitivity else "")
