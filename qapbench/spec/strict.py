"""What all sections of a spec share."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from qapbench.errors import UserError
from qapbench.methods.registry import Registry

from .items import created, parse_item


class Strict(BaseModel):
    """Base of specs: unknown fields are refused, values are not converted, and instances are frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def or_null(schema: dict[str, Any]) -> None:
    """Let the JSON schema of a list take null too, which leaves the field out, in place."""
    listed = {key: schema.pop(key) for key in ("items", "type") if key in schema}
    schema["anyOf"] = [listed, {"type": "null"}]


def named_item(registry: Registry[Any], data: Any, field: str) -> Any:
    """The object that a field of plain data names; None if the field does not name a valid item.

    Args:
        registry: the registry that has the item.
        data: plain data of a section.
        field: name of the field.
    """
    if not isinstance(data, dict):
        return None
    try:
        return created(registry, parse_item(registry, data.get(field)))
    except UserError:
        return None  # the field's own validation reports the mistake


def is_valid(model: type[BaseModel], data: Any) -> bool:
    """Whether a section has no mistakes, or is left out."""
    if data is None or isinstance(data, model):
        return True
    try:
        model.model_validate(data)
    except ValidationError:
        return False
    return True
