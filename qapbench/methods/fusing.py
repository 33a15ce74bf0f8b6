"""Fusions: how relevance and sensitivity become one score."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .registry import Entry, Registry, check_callable
from .scores import batched

Fusion = Callable[[Tensor, Tensor], Tensor]
"""Combination of relevance and sensitivity, each [B, N] in [0, 1], into one score [B, N] that is not negative."""


def _build(entry: Entry[Fusion], params: dict[str, Any]) -> Fusion:
    fusion = functools.partial(entry.target, **params)
    return batched(fusion) if getattr(entry.target, "batched", False) else fusion


fusions: Registry[Fusion] = Registry("fusion", _build, check_callable, positional=2)
"""Registry of fusions; an item is called with relevance and sensitivity [B, N] and returns scores [B, N]."""
fusion = fusions.register
"""Decorator `@fusion(name)`: registers a function of relevance and sensitivity."""
