"""The registry of tasks that come with qapbench or a plugin, beside those that come with lm-eval.

Such a task is a function that reads its questions, with an lm-eval YAML file beside it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from qapbench.errors import UserError
from qapbench.hashing import code_files, digest_files
from qapbench.methods.registry import Entry, Registry

LETTER = "_letter"
"""Suffix of the variant of a task that scores one log-likelihood per option instead of generating text."""


class _Reader(yaml.SafeLoader):
    """YAML's safe loader, which reads lm-eval's `!function module.name` as that text."""


def _text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return str(loader.construct_scalar(node))


_Reader.add_constructor("!function", _text)


@dataclass(frozen=True)
class TaskSource:
    """A registered task, before any of its data is read.

    Attributes:
        name: name of the task in specs.
        read: lm-eval's `custom_dataset`: returns documents by split, from the entries of the YAML's metadata.
        folder: folder of the task's YAML files: `NAME.yaml`, and `NAME_letter.yaml` if it has a letter variant.
        module: module that defines `read`.
    """

    name: str
    read: Callable[..., Mapping[str, Any]]
    folder: Path
    module: str

    @property
    def has_letters(self) -> bool:
        """Whether the task can be answered by the most likely option letter."""
        return (self.folder / f"{self.name}{LETTER}.yaml").is_file()

    @cached_property
    def config(self) -> dict[str, Any]:
        """The task's YAML, merged with the files that it includes. Functions are given by their names."""
        return _config(self.folder / f"{self.name}.yaml")

    @property
    def columns(self) -> list[str]:
        """Names of the task's metrics, in the order of its table."""
        return [str(metric["metric"]) for metric in self.config.get("metric_list", [])]

    def code(self) -> str:
        """Hash of the task's YAML files, and of the code that reads, prompts and scores it."""
        files = {f"yaml {path.name}": path for path in _included(self.folder / f"{self.name}.yaml")}
        if self.has_letters:
            files |= {f"yaml {path.name}": path for path in _included(self.folder / f"{self.name}{LETTER}.yaml")}
        source = inspect.getsourcefile(inspect.unwrap(self.read))
        return digest_files(files | (code_files(Path(source), self.module) if source else {}))


def _config(path: Path) -> dict[str, Any]:
    """A YAML file, merged over the files that it includes."""
    data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Reader)  # safe: _Reader makes plain data only
    below = _config(path.parent / data.pop("include")) if "include" in data else {}
    metadata = {**(below.get("metadata") or {}), **(data.get("metadata") or {})}
    return {**below, **data, "metadata": metadata}


def _included(path: Path) -> list[Path]:
    """A YAML file and all files that it includes."""
    data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Reader)  # safe, as above
    return [path, *(_included(path.parent / data["include"]) if "include" in data else [])]


def _check(target: Any) -> None:
    if not callable(target):
        raise TypeError(f"a task is a function that reads its questions, got {target!r}")


def _build(entry: Entry[TaskSource], params: dict[str, Any]) -> TaskSource:
    inner = inspect.unwrap(entry.target)
    source = inspect.getsourcefile(inner)
    if source is None or not (folder := Path(source).parent).joinpath(f"{entry.name}.yaml").is_file():
        raise UserError(f"task '{entry.name}' has no {entry.name}.yaml beside {source}")
    return TaskSource(entry.name, entry.target, folder, inner.__module__)


tasks: Registry[TaskSource] = Registry("task", _build, _check, positional=None)
"""Registered tasks. A spec can also name any task of lm-eval's."""
task = tasks.register
"""Decorator that registers the function which reads a task's questions; `NAME.yaml` lies beside its file."""


def own_tasks() -> list[str]:
    """Names of the tasks that come with qapbench.

    Reading one of them runs only this project's code, whatever a record says.
    """
    own = [entry.name for entry in tasks if inspect.unwrap(entry.target).__module__.startswith("qapbench.tasks.")]
    return sorted(own)
