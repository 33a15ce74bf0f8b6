"""Every registered item documents itself and refuses wrong parameters readably."""

from collections.abc import Iterator
from typing import Any

import pytest

from qapbench import UserError
from qapbench.methods.kinds import KINDS

ITEMS = [pytest.param(kind, name, id=f"{kind}-{name}") for kind, reg in KINDS.items() for name in reg.names()]


def parameters() -> Iterator[Any]:
    for kind, registry in KINDS.items():
        for name in registry.names():
            for key, schema in registry.describe(name)["parameters"].items():
                yield pytest.param(kind, name, key, schema, id=f"{kind}-{name}-{key}")


def outside(schema: dict[str, Any]) -> list[Any]:
    """Values of the right type that the schema's bounds leave out."""
    values = []
    if "enum" in schema:
        values.append("no-such-choice")
    if "minimum" in schema:
        values.append(schema["minimum"] - 1)
    if "maximum" in schema:
        values.append(schema["maximum"] + 1)
    values += [schema[bound] for bound in ("exclusiveMinimum", "exclusiveMaximum") if bound in schema]
    if schema.get("type") == "number" and values:
        values.append(float("nan"))
    return values


def test_every_kind_has_items() -> None:
    assert all(registry.names() for registry in KINDS.values())


@pytest.mark.parametrize("kind, name", ITEMS)
def test_describes_itself(kind: str, name: str) -> None:
    described = KINDS[kind].describe(name)
    assert described["kind"] == kind
    assert described["name"] == name
    assert len(described["doc"].split()) >= 3, "write a docstring"
    generated = f"{KINDS[kind].entry(name).target.__name__}("
    assert not described["doc"].startswith(generated), "this is the docstring that dataclass makes"
    assert ".py:" in described["origin"]
    source = KINDS[kind].entry(name).source
    assert source is not None
    assert source.is_file()


@pytest.mark.parametrize("kind, name", ITEMS)
def test_created_with_defaults(kind: str, name: str) -> None:
    filled = KINDS[kind].validate(name, {})
    assert set(filled) == set(KINDS[kind].describe(name)["parameters"])
    assert KINDS[kind].validate(name, filled) == filled
    assert callable(KINDS[kind].create(name)) or hasattr(KINDS[kind].create(name), "__dataclass_fields__")


@pytest.mark.parametrize("kind, name", ITEMS)
def test_unknown_name_suggests_the_nearest(kind: str, name: str) -> None:
    with pytest.raises(UserError, match=rf"no {kind} '{name}z'.*did you mean '{name}'"):
        KINDS[kind].create(f"{name}z")


@pytest.mark.parametrize("kind, name", ITEMS)
def test_unknown_parameter_refused(kind: str, name: str) -> None:
    with pytest.raises(UserError, match=rf"qqq: unknown field of {kind} '{name}'"):
        KINDS[kind].create(name, qqq=1)


@pytest.mark.parametrize("kind, name, key, schema", parameters())
def test_misspelt_parameter_suggests_the_nearest(kind: str, name: str, key: str, schema: Any) -> None:
    with pytest.raises(UserError, match=rf"did you mean '{key}'"):
        KINDS[kind].create(name, **{f"{key}z": schema.get("default")})


@pytest.mark.parametrize("kind, name, key, schema", parameters())
def test_wrong_type_refused(kind: str, name: str, key: str, schema: Any) -> None:
    """No coercion either: a number given as text is a mistake."""
    for wrong in (["wrong"], {"wrong": 1}, "4" if schema.get("type") != "string" else 4):
        with pytest.raises(UserError, match=rf"^{key}: .*got"):
            KINDS[kind].create(name, **{key: wrong})


@pytest.mark.parametrize("kind, name, key, schema", parameters())
def test_out_of_range_refused(kind: str, name: str, key: str, schema: Any) -> None:
    for wrong in outside(schema):
        with pytest.raises(UserError, match=rf"^{key}: .*got"):
            KINDS[kind].create(name, **{key: wrong})


def test_the_default_fusion_is_the_papers() -> None:
    assert KINDS["fusion"].default == "convex"
    assert KINDS["fusion"].validate("convex", {}) == {"semantic": 0.7}
