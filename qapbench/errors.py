"""Errors that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

SHOWN = 16  # valid names that a message lists


@dataclass(frozen=True)
class Problem:
    """One mistake: where it stands and what is wrong. As text it is one line, whatever names the message holds."""

    message: str
    where: tuple[str | int, ...] = ()
    line: int | None = None

    def under(self, *prefix: str | int) -> Problem:
        return replace(self, where=(*prefix, *self.where))

    def __str__(self) -> str:
        place = ".".join(_part(part) for part in self.where)
        head = f"line {self.line}: " if self.line else ""
        message = "\\n".join(self.message.splitlines())
        return f"{head}{place}: {message}" if place else f"{head}{message}"


def _part(part: str | int, width: int = 60) -> str:
    """A part of a place: shortened, escaped where it cannot be printed, and in quotes where spaces would be unseen."""
    text = str(part)
    text = text if len(text) <= width else f"{text[: width - 1]}…"
    return text if text and text == text.strip() and text.isprintable() else ascii(text)


@dataclass
class UserError(ValueError):
    """The user's input is wrong. Carries every problem found, so that all can be mended at once.

    It is a ValueError, so that pydantic collects it like any other validation error.

    Attributes:
        problems: the mistakes, in the order in which they were found.
    """

    problems: list[Problem] = field(default_factory=list)

    def __init__(self, problems: str | Problem | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(map(str, self.problems)))

    __hash__ = ValueError.__hash__


class RunFailedError(RuntimeError):
    """A run could not go on, through no mistake in what the user wrote. What was answered so far is kept."""


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, in one line of at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def nearest(name: str, valid: Iterable[str]) -> str:
    """A phrase that names the closest valid name, or the valid names where none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    if not names:
        return "there are none"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"valid: {', '.join(names[:SHOWN])}{more}"
