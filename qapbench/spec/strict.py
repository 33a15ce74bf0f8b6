"""What all sections of a spec share."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


class Strict(BaseModel):
    """Base of specs: unknown fields are refused, values are not converted, and instances are frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def or_null(schema: dict[str, Any]) -> None:
    """Let the JSON schema of a list take null too, which leaves the field out, in place."""
    listed = {key: schema.pop(key) for key in ("items", "type") if key in schema}
    schema["anyOf"] = [listed, {"type": "null"}]


def is_valid(model: type[BaseModel], data: Any) -> bool:
    """Whether a section has no mistakes, or is left out."""
    if data is None or isinstance(data, model):
        return True
    try:
        model.model_validate(data)
    except ValidationError:
        return False
    return True
