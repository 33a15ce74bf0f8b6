"""Checkpoint folders that transformers cannot load as they are: recognised by their config, converted in memory."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_layouts: list[type[Layout]] = []


class Layout(abc.ABC):
    """One way to lay out a checkpoint. Every subclass is known as soon as its module is imported.

    Args:
        folder: the checkpoint; config: its config.json.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = config

    def __init_subclass__(cls) -> None:
        _layouts.append(cls)

    @staticmethod
    @abc.abstractmethod
    def matches(config: Mapping[str, Any]) -> bool:
        """Whether a config.json is of this layout."""

    @abc.abstractmethod
    def companion(self, fetch: bool = True) -> Path:
        """Folder of the checkpoint that this one takes its vision tower from.

        Raises:
            UserError: it cannot be had.
        """

    @abc.abstractmethod
    def load(self, dtype: str) -> tuple[Any, Any]:
        """(a transformers model of a known family, its processor)."""

    @staticmethod
    @abc.abstractmethod
    def default_text_tower(config: Mapping[str, Any]) -> str | None:
        """Name of the CLIP checkpoint whose text tower belongs to the vision tower."""


def layout_of(config: Mapping[str, Any]) -> type[Layout] | None:
    """The layout of a config.json; None where transformers knows it."""
    return next((layout for layout in _layouts if layout.matches(config)), None)
