"""A budget of tokens that is given as a cost, in the place of a number of tokens."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class CostBudget(BaseModel):
    """What the kept tokens may cost. Exactly one of these is given.

    Attributes:
        layer_mean: visual tokens that a layer of the decoder receives, mean over layers.
        flops: FLOPs of the prefill and of choosing the tokens, as a share of the prefill with every token.
        kv_bytes: bytes of the KV cache that the prompt leaves.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    layer_mean: Annotated[float, Field(gt=0)] | None = None
    flops: Annotated[float, Field(gt=0, le=1)] | None = None
    kv_bytes: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one(self) -> CostBudget:
        if len(self.given) != 1:
            raise ValueError("give exactly one of layer_mean, flops and kv_bytes")
        return self

    @property
    def given(self) -> dict[str, float]:
        """What is given: name -> value."""
        return {name: value for name, value in self if value is not None}

    @property
    def name(self) -> str:
        """Which cost it is."""
        return next(iter(self.given))

    @property
    def value(self) -> float:
        """Its value."""
        return self.given[self.name]

    def __str__(self) -> str:
        return f"{self.name} {self.value:g}"


def or_cost(schema: dict[str, Any]) -> None:
    """Let the JSON schema of a number of tokens take a cost too, in place."""
    own = {key: schema.pop(key) for key in ("type", "minimum") if key in schema}
    costs = CostBudget.model_json_schema()["properties"]
    listed = {name: next(one for one in body["anyOf"] if one.get("type") == "number") for name, body in costs.items()}
    bounds = {"additionalProperties": False, "minProperties": 1, "maxProperties": 1}
    schema["anyOf"] = [own, {"type": "object", "properties": listed, **bounds}]
