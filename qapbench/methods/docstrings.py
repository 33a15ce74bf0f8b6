"""Reads what the docstring of a registered item says: what the item is, what its parameters mean, where it comes from.

Docstrings are in Google's style. Parameters are described in a section `Args:` (functions) or `Attributes:` (frozen
dataclasses). A section `Source:` names the paper or states that there is none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from docstring_parser import Docstring, ParseError
from docstring_parser.google import DEFAULT_SECTIONS, GoogleParser, Section, SectionType

SOURCE = "source"
PARSER = GoogleParser([*DEFAULT_SECTIONS, Section("Source", SOURCE, SectionType.SINGULAR)])


@dataclass(frozen=True)
class Documentation:
    """What the docstring of an item says.

    Attributes:
        text: the docstring without its sections. Each paragraph of prose is one line, so that it can be wrapped at any
            width.
        parameters: description of each parameter on one line, by name; those of base classes are included.
        source: content of the item's own `Source:` section on one line; "" if it has none.
    """

    text: str
    parameters: dict[str, str]
    source: str


def documentation(target: Callable[..., Any]) -> Documentation:
    """Parse the docstring of a function or class, and those of its base classes for inherited parameters."""
    own = _parsed(target)
    parameters: dict[str, str] = {}
    for owner in inspect.getmro(target) if isinstance(target, type) else [target]:
        for parameter in _parsed(owner).params:
            parameters.setdefault(parameter.arg_name, _one_line(parameter.description))
    sources = [_one_line(meta.description) for meta in own.meta if meta.args == [SOURCE]]
    return Documentation(_flowing(own.description or ""), parameters, " ".join(sources))


def _parsed(target: Any) -> Docstring:
    """The parsed docstring. One that cannot be parsed, say of a plugin, is taken as a description without sections."""
    text = inspect.getdoc(target) or ""
    try:
        return PARSER.parse(text)
    except ParseError:
        plain = Docstring()
        plain.short_description = text
        return plain


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _flowing(text: str) -> str:
    """The text with the lines of each paragraph joined. Lists and indented blocks keep their lines."""
    paragraphs = text.split("\n\n")
    shaped = [any(line.startswith((" ", "-", "*", ">>>")) for line in part.splitlines()) for part in paragraphs]
    return "\n\n".join(part if keep else _one_line(part) for part, keep in zip(paragraphs, shaped, strict=True))
