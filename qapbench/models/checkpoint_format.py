"""Checkpoint folders that transformers cannot load as they are: recognised by their config, converted in memory."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qapbench.methods.registry import Entry, Registry


class CheckpointFormat(abc.ABC):
    """One way to lay out a checkpoint; `@checkpoint_format(name)` registers a subclass.

    Args:
        folder: the checkpoint; config: its config.json.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = config

    @staticmethod
    @abc.abstractmethod
    def matches(config: Mapping[str, Any]) -> bool:
        """Whether a config.json is of this format."""

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


def _check_format(target: Any) -> None:
    if not (isinstance(target, type) and issubclass(target, CheckpointFormat)):
        raise TypeError(f"a checkpoint format must be a subclass of CheckpointFormat, got {target!r}")


def _target(entry: Entry[type[CheckpointFormat]], params: dict[str, Any]) -> type[CheckpointFormat]:
    target: Any = entry.target
    return target


checkpoint_formats: Registry[type[CheckpointFormat]] = Registry("format", _target, _check_format, positional=2)
checkpoint_format = checkpoint_formats.register


def format_of(config: Mapping[str, Any]) -> type[CheckpointFormat] | None:
    """The format of a config.json; None where transformers itself knows it."""
    registered = (checkpoint_formats.create(name) for name in checkpoint_formats.names())
    return next((format for format in registered if format.matches(config)), None)
