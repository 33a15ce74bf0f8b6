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

from qapbench.errors import UserError
from qapbench.hashing import code_files, digest_files
from qapbench.methods.registry import Entry, Registry
from qapbench.spec.run_spec import TaskSpec

from .task_yaml import included, read_config

LETTER = "_letter"
"""Suffix of the variant of a task that scores one log-likelihood per option instead of generating text."""


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
        return read_config(self.folder / f"{self.name}.yaml")

    @property
    def columns(self) -> list[str]:
        """Names of the task's metrics, in the order of its table."""
        return [str(metric["metric"]) for metric in self.config.get("metric_list", [])]

    def code(self) -> str:
        """Hash of the task's YAML files, and of the code that reads, prompts and scores it."""
        names = [self.name, self.name + LETTER] if self.has_letters else [self.name]
        files = {f"yaml {path.name}": path for name in names for path in included(self.folder / f"{name}.yaml")}
        source = inspect.getsourcefile(inspect.unwrap(self.read))
        return digest_files(files | (code_files(Path(source), self.module) if source else {}))


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


def runs_only_own_code(task: TaskSpec) -> bool:
    """Whether a task comes with qapbench, so that reading it runs no code of anybody else's.

    Args:
        task: the task, as a record of a stranger may name it.
    """
    return task.origin is None and not task.names_own_file and task.name in own_tasks()
