"""The model of a spec: a name or a path, or an embedded model with settings, `{name: NAME, KEY: VALUE}`.

Everywhere else the second form is a text, `NAME:KEY=VALUE,KEY=VALUE`, which a spec and `--set` take as well.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator

from qapbench.errors import Problem, UserError

from .text import checked_name

Setting = str | int | float


def as_text(value: Any) -> str:
    """The model of a spec as a text.

    Args:
        value: a text, or a mapping with `name` and settings.

    Raises:
        UserError: it is neither, or a setting is neither a number nor a word.
    """
    if not isinstance(value, dict):
        if not isinstance(value, str):
            raise UserError(f"a name or a path, or `{{name: NAME, setting: value}}`; got {value!r:.60}")
        return checked_name(value)
    settings = dict(value)
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise UserError(Problem("this field is required: the name of a model", ("name",)))
    for key, setting in settings.items():
        if isinstance(setting, bool) or not isinstance(setting, Setting) or not (isinstance(key, str) and key):
            raise UserError(Problem(f"a number or a word, got {setting!r:.60}", (str(key),)))
        if any(mark in f"{key}{setting}" for mark in ",=:"):
            raise UserError(Problem(f"no ',', '=' or ':' can stand in a setting, got {setting!r:.60}", (str(key),)))
    return checked_name(with_settings(name, settings))


def with_settings(name: str, settings: dict[str, Any]) -> str:
    """A model's name with settings, as a text; numbers are as short as they can be."""
    written = ",".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )
    return f"{name}:{written}" if written else name


def settings_of(text: str) -> tuple[str, dict[str, str]]:
    """The name and the settings in a text; a text that has no settings is a name.

    Args:
        text: a model as `as_text` returns it.
    """
    name, colon, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",")]
    if not colon or not all(key and equals for key, equals, _ in pairs):
        return text, {}
    return name, {key: value for key, _, value in pairs}


ModelName = Annotated[str, PlainValidator(as_text, json_schema_input_type=str | dict[str, Setting])]
"""A `NameOrPath`, or the text of an embedded model with settings."""
