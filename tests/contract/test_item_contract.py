"""Every registered item documents itself and refuses wrong parameters readably."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from qapbench import UserError
from qapbench.cli.items import show
from qapbench.methods.kinds import KINDS
from qapbench.methods.registry import Registry
from qapbench.spec.spec_file import load_spec

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


def undocumented(described: dict[str, Any]) -> list[str]:
    """What the documentation of a described item lacks."""
    parameters = described["parameters"].items()
    missing = [f"description of {key}" for key, schema in parameters if not schema.get("description", "").strip()]
    return missing if described["source"].strip() else [*missing, "Source"]


def toys() -> Registry[Any]:
    """An empty registry of functions of one positional argument, or of classes."""
    return Registry("toy", lambda entry, params: entry.target, positional=1)


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
def test_documents_its_parameters_and_its_source(kind: str, name: str) -> None:
    assert undocumented(KINDS[kind].describe(name)) == []


def test_the_controls_document_their_parameters_and_sources() -> None:
    load_spec("controls")  # registers its plugin
    for name in ("constant", "noise", "least_variance"):
        assert undocumented(KINDS["metric"].describe(name)) == []


@pytest.mark.parametrize("kind, name", ITEMS)
def test_shown_with_its_parameters_and_its_source(kind: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    described = KINDS[kind].describe(name)
    show(kind, name)
    printed = " ".join(capsys.readouterr().out.split())
    assert described["doc"].partition("\n")[0] in printed
    assert f"Source: {described['source']}" in printed
    for key, schema in described["parameters"].items():
        assert f" {key} " in printed
        assert schema["description"][:20] in printed


def test_missing_documentation_is_found() -> None:
    items = toys()

    @items.register("bare")
    def bare(x: float, by: float = 2.0) -> float:
        """Multiply a number."""
        return x * by

    @items.register("partly")
    def partly(x: float, by: float = 2.0, times: int = 1) -> float:
        """Multiply a number several times.

        Args:
            x: the number.
            by: the factor,
                on two lines.

        Source:
            The usual
            definition.
        """
        return x * by**times

    assert undocumented(items.describe("bare")) == ["description of by", "Source"]
    described = items.describe("partly")
    assert undocumented(described) == ["description of times"]
    assert described["parameters"]["by"]["description"] == "the factor, on two lines."
    assert described["source"] == "The usual definition."


def test_descriptions_are_inherited_and_sources_are_not() -> None:
    items: Registry[Any] = Registry("toy", lambda entry, params: entry.target(**params))

    @dataclass(frozen=True)
    class Base:
        """A base class.

        Attributes:
            size: as the base class says.
            speed: as the base class says.

        Source:
            The paper of the base class.
        """

        size: int = 1
        speed: int = 1

    @items.register("derived")
    @dataclass(frozen=True)
    class Derived(Base):
        """A derived class.

        Attributes:
            speed: as the derived class says.
        """

    described = items.describe("derived")
    assert described["parameters"]["size"]["description"] == "as the base class says."
    assert described["parameters"]["speed"]["description"] == "as the derived class says."
    assert undocumented(described) == ["Source"]


def test_a_docstring_that_cannot_be_parsed_is_shown_as_it_is() -> None:
    items = toys()

    @items.register("odd")
    def odd(x: float, by: float = 2.0) -> float:
        """Multiply a number.

        Args:
            nothing that looks like a parameter
        """
        return x * by

    assert undocumented(items.describe("odd")) == ["description of by", "Source"]
    assert "nothing that looks like a parameter" in items.entry("odd").documentation.text


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
