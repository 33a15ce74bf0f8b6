"""The families of questions. Importing this package fills `FAMILIES`."""

from __future__ import annotations

from . import (  # noqa: F401 - importing a module registers its families
    chart,
    compare,
    count,
    dictionary,
    food_web,
    grid,
    icons,
    knowledge,
    language,
    magnets,
    maps,
    passage,
    punnett,
    solutions,
    traits,
)
from .base import FAMILIES, Family

__all__ = ["FAMILIES", "Family"]
