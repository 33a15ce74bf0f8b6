"""The page of a spec's fields, from the models that validate it."""

from __future__ import annotations

import json
import re
from typing import Any

from qapbench.methods.kinds import KINDS
from qapbench.spec.schema import spec_schema

from .markdown import page, table

INTRO = """\
Every field of a spec file with its type, its default and its meaning. The page is made of the models that validate
specs, and `qapbench schema` prints the same for editors. A field without a default must be given. What a method asks
for beyond that (formats that it makes, for example) is on [the method's page](strategies/index.md)."""
FOLLOWS = {"matrix": "none", "cases": "none", "bits": "of the format", "granularity": "of the side"}
"""Defaults of fields that have none of their own, but follow from something else."""
BOUNDS = {"exclusiveMinimum": "> ", "minimum": "≥ ", "exclusiveMaximum": "< ", "maximum": "≤ "}


def pages() -> dict[str, str]:
    """Source of the page, by its path."""
    schema = spec_schema()
    blocks = ["## Top level { #spec }", schema["description"], _fields(schema["properties"])]
    for name, section in schema["$defs"].items():
        if "properties" in section:
            blocks += [f"## {name} {{ #{name} }}", section["description"], _fields(section["properties"])]
    return {"reference/spec.md": page("# Fields of a spec", INTRO, *blocks)}


def parameter_table(parameters: dict[str, dict[str, Any]]) -> str:
    """A table of a strategy's parameters, from their JSON schemas by name."""
    return _table("parameter", parameters)


def _fields(fields: dict[str, dict[str, Any]]) -> str:
    return _table("field", fields)


def _table(head: str, fields: dict[str, dict[str, Any]]) -> str:
    rows = [(f"`{key}`", _type(body), _default(key, body), _plain(body)) for key, body in fields.items()]
    return table((head, "type", "default", "meaning"), rows)


def _plain(body: dict[str, Any]) -> str:
    """What a field means, with what markdown would read as emphasis as it stands."""
    parts = str(body.get("description", "")).split("`")
    parts[::2] = [re.sub(r"([*_<])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def _type(body: dict[str, Any]) -> str:
    """The type of a field in words, with a link to the section or to the strategies that it names."""
    if "$ref" in body:
        name = body["$ref"].rpartition("/")[2]
        return f"[{name}](strategies/index.md#{name})" if name in KINDS else f"[{name}](#{name})"
    if "anyOf" in body:
        return " or ".join(dict.fromkeys(_type(one) for one in body["anyOf"]))
    if "const" in body or "enum" in body:
        return " or ".join(f"`{_written(one)}`" for one in body.get("enum", [body.get("const")]))
    if body.get("type") == "array":
        return f"list of {_type(body['items'])}" if body.get("items") else "list"
    kind = body.get("type", "anything")
    kind = " or ".join(kind) if isinstance(kind, list) else kind
    bounds = [f"{sign}{body[bound]}" for bound, sign in BOUNDS.items() if bound in body]
    return f"{kind} {', '.join(bounds)}".strip()


def _default(key: str, body: dict[str, Any]) -> str:
    if "default" in body:
        return f"`{_written(body['default'])}`"
    return FOLLOWS.get(key, "required")


def _written(value: Any) -> str:
    """A value as YAML writes it."""
    return value if isinstance(value, str) else json.dumps(value)
