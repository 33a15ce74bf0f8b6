"""The JSON Schema of spec files, with which an editor completes fields and marks mistakes while one types."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from qapbench.methods.docstrings import documentation
from qapbench.methods.kinds import KINDS
from qapbench.methods.registry import Registry

from .run_spec import RunSpec
from .sweep_spec import SweepSpec

Schema = dict[str, Any]

DRAFT = "https://json-schema.org/draft/2020-12/schema"
NULL: Schema = {"type": "null"}
VARIES: Schema = {"anyOf": [{"required": ["matrix"]}, {"required": ["cases"]}]}
HAS_PLUGINS: Schema = {"required": ["plugins"], "properties": {"plugins": {"minItems": 1}}}


class _Documented(GenerateJsonSchema):
    """Generates schemas whose descriptions are the docstrings' own, that of a class and that of each field."""

    def model_schema(self, schema: core_schema.ModelSchema) -> Schema:
        return _with_docstring(super().model_schema(schema), schema["cls"])

    def dataclass_schema(self, schema: core_schema.DataclassSchema) -> Schema:
        return _with_docstring(super().dataclass_schema(schema), schema["cls"])


def spec_schema() -> Schema:
    """The JSON Schema (draft 2020-12) of a spec file, for what is registered now.

    What the schema refuses of a single run, `load_spec` refuses too; of several runs it also refuses shared fields
    that every run replaces. The reverse does not hold: whether a model or a data file exists, or a method takes a
    format, only `qapbench validate` knows.
    """
    run = _referring(RunSpec.model_json_schema(schema_generator=_Documented))
    sections = {name: _untitled(body) for name, body in run["$defs"].items() if name != "Item"}
    fields: Schema = _untitled(run)["properties"]
    # In a sweep, a field that a section needs may come from the matrix or from each case instead.
    needed = {name: taken for name, body in sections.items() if (taken := _needed(body))}
    once = {key: needed[name] for key, body in fields.items() if (name := _target(body)) in needed}
    del fields["tasks"]  # which a list under `task` fills
    task = [{"type": "string"}, {"$ref": fields["task"].pop("$ref")}]
    fields["task"]["anyOf"] = [*task, {"type": "array", "minItems": 1, "items": {"anyOf": task, **once["task"]}}]
    strata = {key: fields["strata"].pop(key) for key in ("type", "items")}
    fields["strata"]["anyOf"] = [strata["items"], strata]
    dotted = _dotted(fields, sections)
    items = {key: kind for key, body in dotted.items() if (kind := _target(body)) in KINDS}
    kinds = sorted(set(items.values()))
    registered = {key: _or_null({"$ref": f"#/$defs/registered-{kind}"}) for key, kind in items.items()}
    said = documentation(SweepSpec).parameters
    several = {"type": ["object", "null"]}
    return {
        "$schema": DRAFT,
        "title": "qapbench spec",
        "description": f"{documentation(RunSpec).text} With `matrix` or `cases`, several runs.",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            **fields,
            "matrix": {
                "description": said["matrix"],
                **several,
                "additionalProperties": {"type": "array", "minItems": 1},
            },
            "cases": {"description": said["cases"], **several, "additionalProperties": {"type": "object"}},
        },
        "allOf": [
            _in_sweep({key: _or_null(body) for key, body in dotted.items()}),
            {"if": {"not": VARIES}, "then": {"required": run["required"], "properties": once}},
            # A plugin file registers what only it knows.
            {"if": {"not": HAS_PLUGINS}, "then": {"allOf": [_in_file(registered), _in_sweep(registered)]}},
        ],
        "$defs": {
            **sections,
            **{kind: _item(KINDS[kind]) for kind in kinds},
            **{f"registered-{kind}": _registered(KINDS[kind]) for kind in kinds},
        },
    }


def _needed(section: Schema) -> Schema:
    """What a section says of the fields that it needs, which is taken out of it."""
    return {key: section.pop(key) for key in ("required", "anyOf") if key in section}


def _with_docstring(made: Schema, owner: type) -> Schema:
    """The schema of a class, described by the class's docstring."""
    said = documentation(owner)
    made["description"] = said.text
    names = {field.alias: name for name, field in getattr(owner, "model_fields", {}).items() if field.alias}
    for key, body in made.get("properties", {}).items():
        if meaning := said.parameters.get(names.get(key, key)):
            made["properties"][key] = {**body, "description": meaning}
    return made


def _referring(schema: Any) -> Any:
    """The schema with references to the kinds of items, in place of the comments that name them."""
    if isinstance(schema, list):
        return [_referring(below) for below in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _referring(below) for key, below in schema.items() if key != "$comment"}
    return kept | ({"$ref": f"#/$defs/{schema['$comment']}"} if "$comment" in schema else {})


def _untitled(schema: Schema) -> Schema:
    """The schema without the titles that pydantic makes of field names, which say nothing."""
    fields = {key: {k: v for k, v in body.items() if k != "title"} for key, body in schema["properties"].items()}
    return {**{key: value for key, value in schema.items() if key != "title"}, "properties": fields}


def _item(registry: Registry[Any]) -> Schema:
    """An item as `name` or `{name: {parameter: value}}`. It may be one that a plugin registers."""
    described = map(registry.describe, registry.names())
    known = {one["name"]: _parameters(one["parameters"]) for one in described}
    several = {"type": "object", "minProperties": 1, "maxProperties": 1}
    return {"anyOf": [{"type": "string"}, {**several, "properties": known}]}


def _parameters(parameters: dict[str, Schema]) -> Schema:
    """The parameters of an item, written below its name. Null stands for no parameters."""
    return {
        **_untitled({"type": ["object", "null"], "properties": parameters}),
        "additionalProperties": False,
        "required": [key for key, body in parameters.items() if "default" not in body],
    }


def _registered(registry: Registry[Any]) -> Schema:
    """An item that is registered now: its name, which an editor offers, or the one key of a mapping."""
    described = [registry.describe(name) for name in registry.names()]
    names = [{"const": one["name"], "description": one["doc"].partition("\n")[0]} for one in described]
    return {"anyOf": [*names, {"type": "object", "propertyNames": {"enum": registry.names()}}]}


def _target(body: Schema) -> str | None:
    """Name of the definition that a field refers to; None if it refers to none."""
    references = [one["$ref"] for one in [body, *body.get("anyOf", [])] if "$ref" in one]
    return str(references[0]).rpartition("/")[2] if references else None


def _dotted(fields: dict[str, Schema], sections: dict[str, Schema], above: str = "") -> dict[str, Schema]:
    """Schemas of the dotted keys that a matrix or a case can set."""
    found: dict[str, Schema] = {}
    for key, body in fields.items():
        found[f"{above}{key}"] = body
        if section := sections.get(_target(body) or ""):
            found |= _dotted(section["properties"], sections, f"{above}{key}.")
    return found


def _or_null(body: Schema) -> Schema:
    """The schema, or null, which removes a field."""
    return {"anyOf": [body, NULL]}


def _in_sweep(dotted: dict[str, Schema]) -> Schema:
    """Requirements on the dotted keys of a matrix and of each case."""
    lists = {key: {"items": body} for key, body in dotted.items()}
    return {
        "properties": {
            "matrix": {"properties": lists},
            "cases": {"additionalProperties": {"properties": dotted}},
        }
    }


def _in_file(dotted: dict[str, Schema]) -> Schema:
    """Requirements on the sections of a file, by dotted key."""
    out: Schema = {}
    for key, body in dotted.items():
        *path, last = key.split(".")
        node = out
        for part in path:
            node = node.setdefault("properties", {}).setdefault(part, {})
        node.setdefault("properties", {})[last] = body
    return out
