"""Tasks, found by name: an lm-eval task with what the run engine needs to know of it."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qapbench.errors import Problem, UserError, first_line, nearest
from qapbench.spec import TaskSpec

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

LETTER = "_letter"
"""Ending of the task that scores one log-likelihood an option instead of generating text."""
UNPARSED = "unparsed"
"""The key of process_results that counts answers which no rule of the parser could read."""
NOISY = ("lm_eval", "datasets", "huggingface_hub", "httpx", "httpx2")


@dataclass(frozen=True)
class LoadedTask:
    """A task, ready to be asked.

    Attributes:
        name: as the spec has it, without the ending of its letter variant.
        task: lm-eval's task, for its evaluator.
        columns: the names that `process_results` may give, in the order of the tables; without `unparsed`.
        unavailable: columns that these data cannot give, with the reason.
        embedded: one of this project's own stand-ins, whatever data it is asked on.
        asked: what the spec's task fields come to, defaults filled in: prompt, parser, how answers are made, count.
        stand_in: why these data only stand in for a real benchmark; "" where they do not.
        fingerprint: of the data, in hexadecimal where it is a file's SHA-256.
        count: questions that will be asked, `limit` considered.
        letter: answered by the most likely option, not by generated text.
        stored_parser: the parser for files that another code base wrote; None where the task names none.
    """

    name: str
    task: Task
    columns: list[str]
    unavailable: dict[str, str]
    embedded: bool
    asked: dict[str, Any]
    stand_in: str
    fingerprint: str
    count: int
    letter: bool
    stored_parser: str | None = None

    @property
    def docs(self) -> Any:
        """The documents of the whole data set (of the first `count` for this project's own tasks)."""
        return self.task.eval_docs

    @cached_property
    def ids(self) -> list[str]:
        """The questions' ids in the order of `docs`: their `pid`, or their position where there is none."""
        return [str(doc.get("pid", index)) for index, doc in zip(range(self.count), self.docs, strict=False)]


def load_task(spec: TaskSpec, seed: int = 0) -> LoadedTask:
    """Find a task and read its data.

    The project's own tasks come first; any other name is looked for among lm-eval's. Those bring their own
    data, prompt and kind of answer, so asking them for another one is refused.

    Args:
        spec: what is asked.
        seed: of parsers that guess where an answer cannot be read.

    Raises:
        UserError: no such task, an option that it does not have, or data that cannot be read.
    """
    with quiet():
        own = own_tasks()
        return _load_own(spec, seed, own) if spec.name in own else _load_foreign(spec, own)


def own_tasks() -> dict[str, bool]:
    """The project's own tasks: name -> whether it can be answered by letter."""
    names = _manager({}).all_subtasks
    return {name: name + LETTER in names for name in names if not _variant_of(name, names)}


def _variant_of(name: str, names: list[str]) -> str | None:
    base = name.removesuffix(LETTER)
    return base if base != name and base in names else None


def _load_own(spec: TaskSpec, seed: int, own: dict[str, bool]) -> LoadedTask:
    letter = spec.answers == "letter" and own[spec.name]
    given = {**spec.model_dump(include={"data", "prompt", "parser", "limit"}), "seed": seed}
    # lm-eval merges the manager's metadata over the YAML's and hands the result to `custom_dataset`.
    manager = _manager({key: value for key, value in given.items() if value is not None})
    task = _only_task(spec.name, manager.load([spec.name + LETTER if letter else spec.name])["tasks"])
    loaded = _describe(spec, task)
    if not letter and (generation := getattr(loaded.docs, "generation", None)):
        task.set_config("generation_kwargs", generation, update=True)
    return loaded


def _load_foreign(spec: TaskSpec, own: dict[str, bool]) -> LoadedTask:
    if base := _variant_of(spec.name, [*own, *(name + LETTER for name, letter in own.items() if letter)]):
        message = f"write name: {base} with answers: letter in place of '{spec.name}'"
        raise UserError(Problem(message, ("task", "name")))
    if typo := difflib.get_close_matches(spec.name, own, 1, cutoff=0.85):
        raise _unknown(spec.name, typo)  # no need to wait for lm-eval's index
    manager = _manager({}, lm_eval=True)
    if spec.name not in manager.all_tasks:
        close = difflib.get_close_matches(spec.name, [*own, *manager.all_tasks], 1)
        raise _unknown(spec.name, close or own)
    if spec.name not in manager.all_subtasks:
        raise UserError(Problem(f"'{spec.name}' is a group of tasks; name one of them", ("task", "name")))
    _refuse_options(spec)
    try:
        task = _only_task(spec.name, manager.load([spec.name])["tasks"])
    except Exception as error:  # lm-eval, datasets and the hub have no common base
        message = f"lm-eval cannot load '{spec.name}': {first_line(error)}"
        raise UserError(Problem(message, ("task", "name"))) from None
    generates = task.OUTPUT_TYPE == "generate_until"
    if "answers" in spec.model_fields_set and (spec.answers == "generate") != generates:
        message = f"lm-eval's task '{spec.name}' is of the kind {task.OUTPUT_TYPE}; leave `answers` out"
        raise UserError(Problem(message, ("task", "answers")))
    return _describe(spec, task)


def _unknown(name: str, valid: Iterable[str]) -> UserError:
    hint = nearest(name, valid)
    if not hint.startswith("did"):
        hint += ", and lm-eval's own"
    return UserError(Problem(f"unknown task '{name}'; {hint}", ("task", "name")))


def _refuse_options(spec: TaskSpec) -> None:
    problems = [
        Problem(f"lm-eval's task '{spec.name}' has its own {field}; leave `{field}` out", ("task", field))
        for field in ("data", "prompt", "parser")
        if getattr(spec, field) is not None
    ]
    if problems:
        raise UserError(problems)


def _describe(spec: TaskSpec, task: Task) -> LoadedTask:
    docs = task.eval_docs
    metadata = task.get_config("metadata") or {}
    count = min(spec.limit or len(docs), len(docs))
    return LoadedTask(
        name=spec.name,
        task=task,
        columns=[str(name) for name in task.aggregation() if name != UNPARSED],
        unavailable=dict(getattr(docs, "unavailable", {})),
        embedded=bool(metadata.get("embedded")),
        asked={
            "limit": count,
            "answers": "letter" if task.OUTPUT_TYPE == "multiple_choice" else "generate",
            "prompt": getattr(docs, "prompt", None),
            "parser": getattr(docs, "parser", None),
        },
        stand_in="" if spec.data else str(metadata.get("stand_in") or ""),
        fingerprint=_fingerprint(docs),
        count=count,
        letter=task.OUTPUT_TYPE == "multiple_choice",
        stored_parser=metadata.get("stored_parser"),
    )


def _fingerprint(docs: Any) -> str:
    """The data's own (ours, or that of a `datasets.Dataset`); else a hash of the documents' text."""
    own = getattr(docs, "fingerprint", None) or getattr(docs, "_fingerprint", None)
    if own:
        return str(own)
    return hashlib.sha256(json.dumps(list(docs), default=str, sort_keys=True).encode()).hexdigest()


def _only_task(name: str, tasks: dict[str, Task]) -> Task:
    if len(tasks) != 1:
        raise UserError(Problem(f"'{name}' is {len(tasks)} tasks; name one of them", ("task", "name")))
    return next(iter(tasks.values()))


def _manager(metadata: dict[str, Any], lm_eval: bool = False) -> TaskManager:
    """lm-eval's index; its own 10,000 tasks take seconds to read, so they are left out until needed."""
    from lm_eval.tasks import TaskManager

    import qapbench.tasks

    folders = [Path(folder) for folder in qapbench.tasks.__path__]
    return TaskManager(include_path=folders, include_defaults=lm_eval, metadata=metadata)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hold back the warnings and the loading bars of lm-eval and datasets; errors still show."""
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
