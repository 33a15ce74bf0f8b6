"""The registry of tasks that come with qapbench or a plugin, beside those that come with lm-eval.

Such a task is a function that reads its questions, with an lm-eval YAML file beside it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from qapbench.errors import Problem, UserError
from qapbench.hashing import code_files, digest_files
from qapbench.methods.parameters import problems_of
from qapbench.methods.plugins import error_and_place, plugin_of
from qapbench.methods.registry import Entry, Registry

from .task_yaml import included, read_config

if TYPE_CHECKING:  # what a task imports is part of the identity of its runs
    from qapbench.spec.task_spec import TaskSpec

LETTER = "_letter"
"""Suffix of the variant of a task that scores one log-likelihood per option instead of generating text."""


class _Metric(BaseModel, strict=True):
    metric: str


class _Config(BaseModel, strict=True):
    """The entries of a task's YAML that are read here. lm-eval reads the others."""

    test_split: str
    metric_list: list[_Metric] = []
    metadata: dict[str, Any]


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
    def config(self) -> _Config:
        """What is read here of the task's YAML, merged with the files that it includes.

        Raises:
            UserError: a file cannot be read, or an entry is wrong.
        """
        file = self.folder / f"{self.name}.yaml"
        try:
            return _Config.model_validate(read_config(file))
        except ValidationError as error:
            raise self.broken(f"{file}: {'; '.join(map(str, problems_of(error, _Config)))}") from None
        except UserError as error:
            raise self.broken(str(error)) from None

    @property
    def columns(self) -> list[str]:
        """Names of the task's metrics, in the order of its table."""
        return [entry.metric for entry in self.config.metric_list]

    def documents(self, options: dict[str, Any]) -> Any:
        """The documents that the task asks about.

        Args:
            options: override the entries of the YAML's metadata.

        Raises:
            UserError: the function that reads them fails, or returns something else.
        """
        split = self.config.test_split
        try:
            found = self.read(**{**self.config.metadata, **options})
            docs: Any = found.get(split) if isinstance(found, Mapping) else None
            named = hasattr(docs, "fingerprint") and hasattr(docs, "features")
            usable = named and (not len(docs) or isinstance(docs[0], Mapping))
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise self.broken(error, "reading its questions fails: ") from None
        if docs is None:
            raise self.broken(
                f"{self._reader} returns no split '{split}', which `test_split` of {self.name}.yaml names"
            )
        if not usable:
            raise self.broken(f"{self._reader} returns no documents: mappings, with `features` and a `fingerprint`")
        return docs

    def code(self) -> str:
        """Hash of the task's YAML files, and of the code that reads, prompts and scores it.

        Raises:
            UserError: a YAML file cannot be read.
        """
        names = [self.name, self.name + LETTER] if self.has_letters else [self.name]
        try:
            files = {f"yaml {path.name}": path for name in names for path in included(self.folder / f"{name}.yaml")}
        except UserError as error:
            raise self.broken(str(error)) from None
        source = inspect.getsourcefile(inspect.unwrap(self.read))
        return digest_files(files | (code_files(Path(source), self.module) if source else {}))

    def check(self, letter: bool) -> None:
        """Check that the YAML can be read.

        Args:
            letter: whether that of the letter variant, too.

        Raises:
            UserError: it cannot.
        """
        _ = self.config
        if letter:
            try:
                included(self.folder / f"{self.name}{LETTER}.yaml")
            except UserError as error:
                raise self.broken(str(error)) from None

    def broken(self, why: str | BaseException, what: str = "") -> UserError:
        """The error for a task that does not work, which names its plugin.

        Args:
            why: what is wrong, or what its code raised.
            what: what failed, in front of `why`.
        """
        if not isinstance(why, str):
            why = error_and_place(why, inspect.getsourcefile(inspect.unwrap(self.read)))
        return UserError(Problem(f"task '{self.name}' of {plugin_of(self.module)}: {what}{why}", ("task", "name")))

    @property
    def _reader(self) -> str:
        """The function that reads the questions, and its file."""
        inner = inspect.unwrap(self.read)
        return f"{inner.__qualname__} ({inspect.getsourcefile(inner)})"


def _check(target: Any) -> None:
    if not callable(target):
        raise TypeError(f"a task is a function that reads its questions, got {target!r}")


def _build(entry: Entry[TaskSource], params: dict[str, Any]) -> TaskSource:
    inner = inspect.unwrap(entry.target)
    source = inspect.getsourcefile(inner)
    if source is None or not (folder := Path(source).parent).joinpath(f"{entry.name}.yaml").is_file():
        whose = f"task '{entry.name}' of {plugin_of(inner.__module__)}"
        raise UserError(Problem(f"{whose}: there is no {entry.name}.yaml beside {source}", ("task", "name")))
    return TaskSource(entry.name, entry.target, folder, inner.__module__)


tasks: Registry[TaskSource] = Registry("task", _build, _check, positional=None)
"""Registered tasks. A spec can also name any task of lm-eval's."""
task = tasks.register
"""Decorator that registers the function which reads a task's questions; `NAME.yaml` lies beside its file."""


OWN = "qapbench.tasks"  # the package that registers the tasks of this project


def own_tasks() -> list[str]:
    """Names of the tasks that come with qapbench.

    Reading one of them runs only this project's code, whatever a record says.
    """
    importlib.import_module(OWN)  # rather than all plugins, of which strategies load torch
    made = tasks.registered()
    return sorted(one.name for one in made if inspect.unwrap(one.target).__module__.startswith(f"{OWN}."))


def runs_only_own_code(task: TaskSpec) -> bool:
    """Whether a task comes with qapbench, so that reading it runs no code of anybody else's.

    Args:
        task: the task, as a record of a stranger may name it.
    """
    return task.origin is None and not task.names_own_file and task.name in own_tasks()
