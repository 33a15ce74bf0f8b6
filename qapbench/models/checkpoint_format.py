"""Formats of checkpoint folders that transformers cannot load itself.

They are recognised by their config, and converted in memory.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qapbench.errors import Problem, UserError
from qapbench.methods.registry import Entry, Registry


class CheckpointFormat(abc.ABC):
    """A format of checkpoint folders. `@checkpoint_format(name)` registers a subclass.

    Args:
        folder: folder of the checkpoint.
        config: content of its config.json.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = config

    @staticmethod
    @abc.abstractmethod
    def matches(config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this config.json has this format."""

    @abc.abstractmethod
    def companion(self, fetch: bool = True) -> Path:
        """Folder of the checkpoint that the vision tower is taken from.

        Args:
            fetch: whether it may be downloaded.

        Raises:
            UserError: it is not there, or cannot be downloaded.
        """

    @abc.abstractmethod
    def load(self, dtype: str) -> tuple[Any, Any]:
        """Load the checkpoint.

        Args:
            dtype: name of the dtype of the weights.

        Returns:
            A transformers model of a known family, and its processor.
        """

    def empty(self, dtype: str) -> Any:
        """The model without weights, on the "meta" device. Its cost is counted from it, and nothing is downloaded.

        Args:
            dtype: name of the dtype of the weights.

        Raises:
            UserError: the format cannot make it.
        """
        what = "its layout is that of its authors, which says too little of the model; name the one for transformers"
        raise UserError(Problem(what, ("model",)))

    @staticmethod
    @abc.abstractmethod
    def default_text_tower(config: Mapping[str, Any]) -> str | None:
        """Name of the CLIP checkpoint whose text tower belongs to the vision tower; None if it is not known."""


def _check_format(target: Any) -> None:
    if not (isinstance(target, type) and issubclass(target, CheckpointFormat)):
        raise TypeError(f"a checkpoint format must be a subclass of CheckpointFormat, got {target!r}")


def _target(entry: Entry[type[CheckpointFormat]], params: dict[str, Any]) -> type[CheckpointFormat]:
    target: Any = entry.target
    return target


checkpoint_formats: Registry[type[CheckpointFormat]] = Registry("format", _target, _check_format, positional=2)
"""Registered checkpoint formats."""
checkpoint_format = checkpoint_formats.register
"""Decorator that registers a subclass of CheckpointFormat under a name."""


def format_of(config: Mapping[str, Any]) -> type[CheckpointFormat] | None:
    """The registered format of a checkpoint with this config.json; None if transformers can load it itself."""
    registered = (checkpoint_formats.create(name) for name in checkpoint_formats.names())
    return next((format for format in registered if format.matches(config)), None)
