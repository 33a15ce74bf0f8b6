"""Tasks that are registered with qapbench: a function that reads their questions, beside lm-eval's own YAML files."""

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
"""Ending of the task that scores one log-likelihood per option instead of generating text."""


class _Reader(yaml.SafeLoader):
    """YAML's safe loader; lm-eval's `!function module.name` is read as that text."""


def _text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    return str(loader.construct_scalar(node))


_Reader.add_constructor("!function", _text)


@dataclass(frozen=True)
class TaskSource:
    """A registered task before anything of it is read.

    Attributes:
        name: as a spec names it.
        read: lm-eval's `custom_dataset`: the documents by split, from the keywords of the YAML's metadata.
        folder: of the task's YAML files, `NAME.yaml` and perhaps `NAME_letter.yaml`.
        module: that defines `read`.
    """

    name: str
    read: Callable[..., Mapping[str, Any]]
    folder: Path
    module: str

    @property
    def has_letters(self) -> bool:
        """Whether it can be answered by the most likely option letter."""
        return (self.folder / f"{self.name}{LETTER}.yaml").is_file()

    @cached_property
    def config(self) -> dict[str, Any]:
        """The task's YAML with what it includes; functions by their names."""
        return _config(self.folder / f"{self.name}.yaml")

    @property
    def columns(self) -> list[str]:
        """Names of the task's metrics, in the order of its table."""
        return [str(metric["metric"]) for metric in self.config.get("metric_list", [])]

    def code(self) -> str:
        """Hash of the task's YAML files and of the code that reads, prompts and scores it."""
        files = {f"yaml {path.name}": path for path in _included(self.folder / f"{self.name}.yaml")}
        if self.has_letters:
            files |= {f"yaml {path.name}": path for path in _included(self.folder / f"{self.name}{LETTER}.yaml")}
        source = inspect.getsourcefile(inspect.unwrap(self.read))
        return digest_files(files | (code_files(Path(source), self.module) if source else {}))


def _config(path: Path) -> dict[str, Any]:
    data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Reader)  # safe: the loader above makes plain data only
    below = _config(path.parent / data.pop("include")) if "include" in data else {}
    metadata = {**(below.get("metadata") or {}), **(data.get("metadata") or {})}
    return {**below, **data, "metadata": metadata}


def _included(path: Path) -> list[Path]:
    """A YAML file and those that it includes."""
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
"""Registered tasks; a spec can also name any task of lm-eval's."""
task = tasks.register
"""Decorator: this function reads the questions of the task whose `NAME.yaml` lies beside it."""


def own_tasks() -> list[str]:
    """Tasks that come with qapbench: reading them runs no code but this project's, whatever a record says."""
    return [name for name in tasks.names() if tasks.create(name).module.startswith("qapbench.tasks.")]
