"""Markdown that the generated pages are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; new lines and bars in its cells are escaped."""
    lines = [[_cell(text) for text in row] for row in [heads, *rows]]
    lines.insert(1, ["---"] * len(heads))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str, language: str = "") -> str:
    """A block of code."""
    return f"```{language}\n{text.strip()}\n```"


def indented(text: str) -> str:
    """The text four columns further right, as the body of an admonition is written."""
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())


def page(*parts: str) -> str:
    """A page of its parts; those that are empty are left out."""
    return "\n\n".join(filter(None, parts)) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
