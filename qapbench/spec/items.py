"""Registered items in a spec, written as `name` or `{name: {parameter: value}}`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer
from pydantic.functional_validators import BeforeValidator

from qapbench.errors import UserError
from qapbench.methods.fusing import fusions
from qapbench.methods.kinds import allocations, metrics, pruners, ptqs
from qapbench.methods.registry import Registry


class Item(BaseModel):
    """A registered item that a spec names.

    Attributes:
        name: name of the item in its registry.
        params: value of each parameter.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    params: dict[str, Any] = Field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.name)  # items are keys of dictionaries in loops, and few differ in parameters alone

    def __str__(self) -> str:
        return self.name


def parse_item(registry: Registry[Any], value: Any) -> Item:
    """The item that a spec's plain data names, with its parameters validated and defaults filled in.

    Args:
        registry: the registry that has the item.
        value: an item, a name, or `{name: {parameter: value}}`.

    Raises:
        UserError: `value` has another form, the registry has no such item, or a parameter is wrong.
    """
    if isinstance(value, Item):
        name, params = value.name, value.params
    elif isinstance(value, str):
        name, params = value, {}
    elif isinstance(value, dict) and len(value) == 1:
        name, params = next(iter(value.items()))
        params = {} if params is None else params
    else:
        name, params = None, None
    if not isinstance(name, str) or not isinstance(params, dict):
        raise UserError(f"expected a {registry.kind} as `name` or `{{name: {{parameter: value}}}}`")
    try:
        return Item(name=name, params=registry.validate(name, params))
    except UserError as error:
        nested = isinstance(value, dict)
        raise UserError([p.under(name) if nested and p.where else p for p in error.problems]) from None


def created(registry: Registry[Any], item: Item) -> Any:
    """The object that a registry creates from an item."""
    return registry.create(item.name, **item.params)


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


class _Kind:
    """Names the kind of a field's items in the JSON Schema of the field, for `qapbench.spec.schema`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"$comment": self.kind}


def _field(registry: Registry[Any]) -> Any:
    """The type of a spec's field that holds an item of this registry."""

    def parse(value: Any) -> Item:
        return parse_item(registry, value)

    def dump(item: Item) -> Any:
        return {item.name: item.params} if item.params else item.name

    return Annotated[Item, BeforeValidator(parse), PlainSerializer(dump), _Kind(registry.kind)]


if TYPE_CHECKING:
    MetricItem = Item
    PrunerItem = Item
    FusionItem = Item
    PTQItem = Item
    AllocationItem = Item
else:
    kinds = (metrics, pruners, fusions, ptqs, allocations)
    MetricItem, PrunerItem, FusionItem, PTQItem, AllocationItem = map(_field, kinds)
