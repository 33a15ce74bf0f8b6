"""Finds tasks by name and loads them: registered tasks, the user's own YAML files, and all tasks of lm-eval's."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qapbench.errors import Problem, UserError, first_line
from qapbench.records.tally import UNPARSED
from qapbench.spec.task_spec import TaskSpec

from .images import listed_images
from .index import TaskIndex, lm_eval_folder, lm_eval_index
from .lmms_index import find_lmms_task
from .outline import (
    TaskOutline,
    given_options,
    letter_base,
    outline_of,
    read_outline,
    score_column,
    typo_of,
    unknown_task,
)
from .registry import LETTER, tasks
from .task_file import TaskFile, find_task_file

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

NOISY = ("lm_eval", "datasets", "huggingface_hub", "httpx", "httpx2")


@dataclass(frozen=True)
class LoadedTask(TaskOutline):
    """A task that is ready to be asked.

    Attributes:
        task: lm-eval's task object, for its evaluator.
    """

    task: Any = None  # always given: it has a default only because fields of the outline have some

    @cached_property
    def means(self) -> frozenset[str]:
        """The columns whose figure is the mean of what is per question."""
        return frozenset(name for name, total in self.task.aggregation().items() if total.__name__ == "mean")

    @property
    def has_images(self) -> bool:
        """Whether documents of this task may have images, which `<image>` marks in their text."""
        return bool(getattr(self.task, "MULTIMODAL", False))

    def images(self, doc: int) -> Sequence[Any]:
        """Images of a document, not decoded.

        Args:
            doc: number of the document.
        """
        return listed_images(self.task.doc_to_image(self.docs[doc])) if self.has_images else []


def find_outline(spec: TaskSpec, seed: int = 0) -> TaskOutline:
    """The outline of a task. lm-eval is imported only for tasks of its own.

    Args:
        spec: the task and its options.
        seed: of parsers that guess if an answer cannot be read.

    Raises:
        UserError: as `load_task`.
    """
    registered = spec.origin is None and not spec.names_own_file and spec.name in tasks
    return read_outline(spec, seed) if registered else load_task(spec, seed)


def load_task(spec: TaskSpec, seed: int = 0) -> LoadedTask:
    """Find a task and read its data.

    A file of the user's own comes first, if the spec names a file or a folder; then come registered tasks. Any other
    name is looked up among lm-eval's tasks. These and the user's files bring their own data, prompt and way of
    answering, so a spec that asks for others is refused. A task `from: lmms-eval` is looked up only there.

    Args:
        spec: the task and its options.
        seed: of parsers that guess if an answer cannot be read.

    Raises:
        UserError: there is no such task, it does not have one of the options, or its data cannot be read.
    """
    loaded = _load_from_lmms_eval(spec) if spec.origin == "lmms-eval" else _load(spec, seed)
    return replace(loaded, background=spec.background, blank=spec.blank_images)


def _load(spec: TaskSpec, seed: int) -> LoadedTask:
    """Load a registered task, one of lm-eval's, or one of a file of the user's."""
    own = find_task_file(spec)
    registered = own is None and spec.name in tasks
    if not registered:
        if own is None:
            _refuse_unknown(spec.name)  # before lm-eval is imported, which takes seconds
        _refuse_options(spec)
    with quiet():
        return _load_registered(spec, seed) if registered else _load_from_lm_eval(spec, own)


def _load_registered(spec: TaskSpec, seed: int) -> LoadedTask:
    source = tasks.create(spec.name)
    letter = spec.answers == "letter" and source.has_letters
    source.check(letter)
    # lm-eval merges the manager's metadata over the YAML's and hands the result to `custom_dataset`.
    try:
        manager = _manager([source.folder], given_options(spec, seed))
        task = _only_task(spec.name, manager.load([spec.name + LETTER if letter else spec.name])["tasks"])
        docs = task.eval_docs
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # lm-eval and the plugin's code have no common base
        raise source.broken(error, "it cannot be loaded: ") from None
    outline = outline_of(spec, source, docs)
    if not letter and (generation := getattr(outline.docs, "generation", None)):
        task.set_config("generation_kwargs", generation, update=True)
    return LoadedTask(**{field.name: getattr(outline, field.name) for field in fields(outline)}, task=task)


def _refuse_unknown(name: str) -> None:
    """Check that a name is one of lm-eval's tasks.

    Raises:
        UserError: it is not; the error suggests the nearest name.
    """
    if base := letter_base(name):
        message = f"write name: {base} with answers: letter in place of '{name}'"
        raise UserError(Problem(message, ("task", "name")))
    if typo := typo_of(name):
        raise unknown_task(name, [typo])
    index = lm_eval_index()
    if name in index.groups:
        raise UserError(Problem(f"'{name}' is a group of tasks; name one of them", ("task", "name")))
    if name not in index.files:
        # To compare a name with all 14,000 takes half a second: one mistake leaves the first or the last letters alone.
        alike = [known for known in index.names if known[:2] == name[:2] or known[-3:] == name[-3:]]
        close = difflib.get_close_matches(name, [*tasks.names(), *alike], 1)
        raise unknown_task(name, close or tasks.names())


def _load_from_lm_eval(spec: TaskSpec, own: TaskFile | None) -> LoadedTask:
    """Load a task of lm-eval's, or of a file of the user's."""
    name = own.name if own else spec.name
    where = own.path if own else spec.name
    try:
        manager = _manager([own.path.parent], {}) if own else _lm_eval_manager(name, lm_eval_index())
        task = _only_task(name, manager.load([str(own.path) if own else name])["tasks"])
    except UserError:
        raise
    except Exception as error:  # lm-eval, datasets, the hub and the functions of a user's file have no common base
        message = f"lm-eval cannot load '{where}': {type(error).__name__}: {first_line(error)}"
        raise UserError(Problem(message, ("task", "name"))) from None
    return _as_loaded(spec, task, name, own, _fingerprint(task.eval_docs))


def _load_from_lmms_eval(spec: TaskSpec) -> LoadedTask:
    """Load a task of lmms-eval's."""
    _refuse_options(spec, "lmms-eval", ("prompt", "parser"))
    found = find_lmms_task(spec.name)  # before lmms-eval and lm-eval are imported
    with quiet():
        from .lmms_task import load_lmms_task

        task, fingerprint, overall = load_lmms_task(found, spec.data)
        return _as_loaded(spec, task, found.name, found, fingerprint, overall)


def _as_loaded(
    spec: TaskSpec, task: Task, name: str, own: TaskFile | None, fingerprint: str, overall: str | None = None
) -> LoadedTask:
    """A task that is not registered, ready to be asked.

    Args:
        spec: the task and its options.
        task: lm-eval's task object.
        name: the task's name.
        own: the file that identifies it; None for a task that comes with lm-eval.
        fingerprint: hash of its data.
        overall: the metric that is its score; None for the first one.
    """
    letter = task.OUTPUT_TYPE == "multiple_choice"
    if "answers" in spec.model_fields_set and (spec.answers == "generate") != (task.OUTPUT_TYPE == "generate_until"):
        message = f"task '{name}' is of the kind {task.OUTPUT_TYPE}; leave `answers` out"
        raise UserError(Problem(message, ("task", "answers")))
    docs, metadata = task.eval_docs, task.get_config("metadata") or {}
    columns = [str(name) for name in task.aggregation() if name != UNPARSED]
    better = task.higher_is_better()
    count = min(spec.limit or len(docs), len(docs))
    asked = {"limit": count, "answers": "letter" if letter else "generate", "prompt": None, "parser": None}
    return LoadedTask(
        name=name,
        docs=docs,
        columns=columns,
        unavailable={},
        embedded=bool(metadata.get("embedded")),
        asked=asked | ({"name": name} if own else {}),  # the name in the spec may be a path
        stand_in="",
        fingerprint=fingerprint,
        count=count,
        letter=letter,
        source=own,
        score=score_column(spec, columns, overall or columns[0]) if columns else None,
        lower=frozenset(name for name in columns if better.get(name) is False),
        task=task,
    )


def _refuse_options(
    spec: TaskSpec, library: str = "lm-eval", fields: Sequence[str] = ("data", "prompt", "parser")
) -> None:
    """Check that a spec sets no options that the tasks of a library do not have.

    Raises:
        UserError: it does.
    """
    problems = [
        Problem(f"{library}'s task '{spec.name}' has its own {field}; leave `{field}` out", ("task", field))
        for field in fields
        if getattr(spec, field) is not None
    ]
    if problems:
        raise UserError(problems)


def _fingerprint(docs: Any) -> str:
    """The fingerprint of a `datasets.Dataset`, or a hash of the documents' text if there is none."""
    own = getattr(docs, "fingerprint", None) or getattr(docs, "_fingerprint", None)
    if own:
        return str(own)
    return hashlib.sha256(json.dumps(list(docs), default=str, sort_keys=True).encode()).hexdigest()


def _only_task(name: str, found: dict[str, Task]) -> Task:
    if len(found) != 1:
        raise UserError(Problem(f"'{name}' is {len(found)} tasks; name one of them", ("task", "name")))
    return next(iter(found.values()))


def _lm_eval_manager(name: str, index: TaskIndex) -> TaskManager:
    """lm-eval's task manager for the folder of one task. For all 14,000 files it would take seconds."""
    return _manager([(lm_eval_folder() / index.files[name]).parent], {})


def _manager(folders: list[Path], metadata: dict[str, Any]) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=False, metadata=metadata)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While the context is open, silence warnings and progress bars of lm-eval and datasets. Errors still show."""
    import datasets

    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    bars = not datasets.are_progress_bars_disabled()
    try:
        for logger in loggers:
            logger.setLevel(max(logger.level, logging.ERROR))
        datasets.disable_progress_bars()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
