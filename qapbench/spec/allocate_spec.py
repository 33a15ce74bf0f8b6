"""The `allocate` part of a `quantize` section: bits that each layer gets from its sensitivity."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .items import AllocationItem
from .strict import Strict

Choice = Annotated[int, Field(ge=2, le=8)]


def or_name(schema: dict[str, Any]) -> None:
    """Let the JSON schema of the section take the name of a method too, in place."""
    schema["anyOf"].append({"type": "string"})


class AllocateSpec(Strict):
    """How bits are allocated to layers.

    Attributes:
        method: who chooses among the bits, given the measured errors of each layer.
        bits: bits per weight, mean over all weights that are allocated, which may be reached; None takes the `bits` of
            the section's `weights`.
        choices: numbers of bits that a layer can get.
        per: what gets bits of its own: each decoder layer (or block of another part), or each linear.
    """

    method: AllocationItem
    bits: Annotated[float, Field(ge=2, le=8)] | None = None
    choices: list[Choice] = Field(default=[2, 3, 4, 8], min_length=1)
    per: Literal["layer", "linear"] = "layer"

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, data: Any) -> Any:
        """Accept `allocate: NAME`, and put the choices in order, so that equal ones give equal runs."""
        if isinstance(data, str):
            return {"method": data}
        if not isinstance(data, dict):
            return data
        filled, choices = dict(data), data.get("choices")
        if isinstance(choices, list) and all(type(one) is int for one in choices):
            filled["choices"] = sorted(set(choices))
        if type(data.get("bits")) is int:
            filled["bits"] = float(data["bits"])
        return filled
