"""Formats of some linears in the place of the section's: `quantize.overrides`, by glob over names of linears."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from pydantic import SerializerFunctionWrapHandler, ValidationError, model_serializer

from qapbench.errors import Problem, UserError, nearest
from qapbench.methods.formats import Format, LinearFormats
from qapbench.methods.parameters import problems_of

from .strict import Strict
from .text import NameOrPath

SIDES = ("weights", "activations")


class Override(Strict):
    """The formats of the linears that a glob names.

    Attributes:
        linears: glob over names of linears. It fits a whole name, or what is behind one of its dots, so that
            `down_proj` and `layers.0.*` fit in every model; `*` stands for any characters, dots too.
        weights: format of their weights; None leaves them as they are.
        activations: format of their inputs; None leaves them as they are.
    """

    linears: NameOrPath
    weights: Format | None = None
    activations: Format | None = None

    @model_serializer(mode="wrap")
    def _with_format(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain data, complete: read again, nothing of it comes from the section's own formats."""
        data: dict[str, Any] = dump(self)
        return {key: {"format": "int", **value} if isinstance(value, dict) else value for key, value in data.items()}

    def fits(self, linear: str) -> bool:
        """Whether a linear of this name is meant."""
        return _compiled(self.linears).match(linear) is not None

    @property
    def label(self) -> str:
        """The override in words: "*.down_proj W8A4", or "*.down_proj in full precision"."""
        kept = self.weights is None and self.activations is None
        w, a = (16 if one is None else one.bits for one in (self.weights, self.activations))
        return f"{self.linears} in full precision" if kept else f"{self.linears} W{w}A{a}"


@functools.lru_cache(maxsize=1024)
def _compiled(glob: str) -> re.Pattern[str]:
    """The pattern of names that a glob fits, whole or behind a dot."""
    return re.compile(rf"(?:.*\.)?{fnmatch.translate(glob)}", re.DOTALL)


def parsed(given: Any, section: Mapping[str, Format | None]) -> list[Override]:
    """The overrides of a section, of which what they do not name is filled in from its own formats.

    Args:
        given: a mapping from globs to formats, where None stands for full precision; or a list of `Override`s or their
            plain data.
        section: format of the section's weights and activations, by these names.

    Raises:
        UserError: something is wrong; all mistakes are listed.
    """
    found, problems = [], list[Problem]()
    for where, entry in _entries(given):
        if isinstance(entry, Override):
            found.append(entry)
            continue
        try:
            found.append(Override.model_validate(_filled(entry, section)))
        except UserError as error:
            problems += [problem.under(where) for problem in error.problems]
        except ValidationError as error:
            problems += [problem.under(where) for problem in problems_of(error, Override)]
    if problems:
        raise UserError(problems)
    return found


def _entries(given: Any) -> Iterator[tuple[str | int, Any]]:
    """Where each override stands, and its plain data."""
    if isinstance(given, Sequence) and not isinstance(given, str):
        yield from enumerate(given)
        return
    if not isinstance(given, Mapping):
        raise UserError(
            f"expected a mapping from globs to formats, such as {{'*.down_proj': {{weights: {{bits: 8}}}}}}"
            f" (got {given!r:.60})"
        )
    for glob, formats in given.items():
        if formats is None:
            formats = dict.fromkeys(SIDES)
        elif isinstance(formats, Mapping) and "linears" in formats:
            raise UserError(Problem(f"unknown field; {nearest('linears', SIDES)}", (str(glob), "linears")))
        yield str(glob), {**formats, "linears": glob} if isinstance(formats, Mapping) else formats


def _filled(entry: Any, section: Mapping[str, Format | None]) -> Any:
    """The plain data of an override with complete formats."""
    if not isinstance(entry, Mapping):
        raise UserError(f"expected `weights`, `activations` or both, or null for full precision (got {entry!r:.60})")
    glob = entry.get("linears")
    if isinstance(glob, str) and glob.startswith("re:"):
        raise UserError("a glob and no regular expression: write '*' where that has '.*', and no 're:' in front")
    if len(entry) < 2 and "linears" in entry:
        raise UserError("says nothing; give `weights`, `activations` or both, or null for full precision")
    filled = dict(entry)
    for side in SIDES:
        own, whole = filled.get(side), section.get(side)
        if side not in filled:
            filled[side] = whole
        elif isinstance(own, Mapping) and whole is not None and own.get("format", whole.format) == whole.format:
            filled[side] = {**whole.model_dump(), **own}
    return filled


def formats_of(overrides: Sequence[Override], own: LinearFormats, linear: str) -> LinearFormats:
    """The formats of a linear: those of the first override that fits its name, or the section's own."""
    for override in overrides:
        if override.fits(linear):
            return LinearFormats(override.weights, override.activations)
    return own


def check_fitting(overrides: Sequence[Override], linears: Collection[str]) -> None:
    """Check that every override counts for a linear of the model.

    Args:
        overrides: the overrides.
        linears: names of the linears in scope.

    Raises:
        UserError: one fits none, or those before it take all that it fits. Its message has the nearest names.
    """
    problems, left = [], set(linears)
    for override in overrides:
        fitting = {name for name in linears if override.fits(name)}
        if not fitting:
            message = f"fits no linear in scope; {_nearest_linear(override.linears, linears)}"
            problems.append(Problem(message, ("quantize", "overrides", override.linears)))
        elif not fitting & left:
            message = "never counts, since those before it take all linears that it fits; put it in front of them"
            problems.append(Problem(message, ("quantize", "overrides", override.linears)))
        left -= fitting
    if problems:
        raise UserError(problems)


def _nearest_linear(glob: str, linears: Collection[str]) -> str:
    """A phrase that names what is close to a glob in the names of linears, and a whole name."""
    said = [part for part in glob.split(".") if part.strip("*")]
    pieces = {name.rpartition(".")[2] for name in linears}
    for parts in (name.split(".") for name in linears):
        pieces |= {".".join(parts[at : at + len(said)]) for at in range(len(parts) - len(said) + 1)} if said else set()
    example = min(linears, default=None)
    phrase = nearest(".".join(said), pieces)
    return phrase if example is None else f"{phrase} (a whole name is '{example}')"


def or_mapping(schema: dict[str, Any]) -> None:
    """Let the JSON schema of a list of overrides take a mapping from globs too, in place."""
    listed = {key: schema.pop(key) for key in ("items", "type") if key in schema}
    properties = Format.model_json_schema()["properties"]
    parts = {name: {key: value for key, value in body.items() if key != "title"} for name, body in properties.items()}
    side = {"type": ["object", "null"], "properties": parts, "additionalProperties": False}
    one = {
        "type": ["object", "null"],
        "properties": dict.fromkeys(SIDES, side),
        "additionalProperties": False,
        "minProperties": 1,
    }
    schema["anyOf"] = [{"type": "object", "additionalProperties": one}, listed, {"type": "null"}]
