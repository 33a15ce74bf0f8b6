"""Texts that a spec may hold: what no name and no path can be is refused before anything is looked up by it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, PlainValidator

from qapbench.errors import Problem, UserError

LONGEST = 4096  # characters of one text, which is the longest path that Linux opens
_UNFIT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters except tabs and line ends, and halves of a surrogate pair."""


def unfit(text: str) -> str | None:
    """Why a text cannot be part of a spec; None if it can."""
    if len(text) > LONGEST:
        return f"has {len(text)} characters, of which {LONGEST} are allowed"
    if found := _UNFIT.search(text):
        return f"holds the character U+{ord(found[0]):04X}, which no name or path can have"
    return None


def shown(text: str, width: int = 60) -> str:
    """A text for a message, in quotes: shortened, and escaped where it cannot be printed."""
    short = text if len(text) <= width else f"{text[: width - 1]}…"
    return f"'{short}'" if short.isprintable() else ascii(short)


def checked_name(text: str) -> str:
    """The text, if it can be a name or a path.

    Raises:
        ValueError: it cannot; the message says why.
    """
    if not text:
        raise ValueError("empty; leave the field out, or give a name or a path")
    if why := unfit(text):
        raise ValueError(why)
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise ValueError("there is no home folder of that user") from None
    if any(len(part.encode()) > 255 for part in Path(text).parts):
        raise ValueError("a name of more than 255 bytes, which no file can have")
    return text


NameOrPath = Annotated[str, AfterValidator(checked_name)]
"""The name of something registered, a path, or a hub id."""


def _data(value: Any) -> str | dict[str, str]:
    """One name or path, or a mapping of them."""
    if not isinstance(value, dict):
        return _text(value, ())
    return {_text(key, (str(key),)): _text(place, (str(key),)) for key, place in value.items()}


def _text(value: Any, where: tuple[str, ...]) -> str:
    try:
        if not isinstance(value, str):
            raise ValueError(f"a path, or a mapping from hub ids to paths; got {value!r:.60}")
        return checked_name(value)
    except ValueError as error:
        raise UserError(Problem(str(error), where)) from None


Data = Annotated[str | dict[str, str], PlainValidator(_data, json_schema_input_type=str | dict[str, str])]
"""A `NameOrPath`, or a mapping from hub ids to paths."""
