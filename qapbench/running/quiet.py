"""Keeps the progress bars of other libraries off the screen, on which qapbench shows its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


@contextlib.contextmanager
def no_foreign_bars() -> Iterator[None]:
    """While the context is open, nothing that uses tqdm draws a bar: transformers, lm-eval, datasets.

    Some of them ask for a bar whatever tqdm's own settings say, so the class itself is told.
    """
    original = tqdm.__init__

    def disabled(self: tqdm[Any], *arguments: Any, **more: Any) -> None:
        original(self, *arguments, **{**more, "disable": True})

    tqdm.__init__ = disabled
    try:
        yield
    finally:
        tqdm.__init__ = original
