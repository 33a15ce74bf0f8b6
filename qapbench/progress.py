"""Progress callbacks: the one shape that everything uses to say how far it is."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

ProgressCallback = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


def silent(what: str, done: int, total: int) -> None:
    """The callback of whoever does not want to be told."""


assembly_progress: ContextVar[ProgressCallback | None] = ContextVar("assembly_progress", default=None)
"""Told while an embedded model is put together on first use; None shows it in a terminal or a notebook."""
