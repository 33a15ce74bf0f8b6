"""Runs that were begun and are not finished: they have no record, and therefore no row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from qapbench import UserError
from qapbench.records.record import RECORD, read_json
from qapbench.records.store import answers_of
from qapbench.spec.task_spec import TaskSpec
from qapbench.tasking.outline import read_outline
from qapbench.tasking.registry import runs_only_own_code

from .rows import clean, mapping, text


@dataclass(frozen=True)
class Unfinished:
    """A run without a record.

    Attributes:
        name: its name.
        answered: number of questions that are answered.
        total: number of questions in all; None if its data are not on this machine.
    """

    name: str
    answered: int
    total: int | None


def unfinished_runs(runs: Path) -> list[Unfinished]:
    """The runs below a folder that have a spec and no record, by name. What `--fresh` set aside does not count."""
    totals: dict[str, int | None] = {}
    found = []
    for path in sorted(runs.glob("*/spec.json")):
        folder = path.parent
        if ".old" in folder.name or (folder / RECORD).exists():
            continue
        try:
            spec = mapping(clean(read_json(path)))
            answered = answers_of(folder).count()
        except (UserError, OSError):
            spec, answered = {}, 0
        task = mapping(spec.get("task"))
        if str(task) not in totals:
            totals[str(task)] = _questions(task)
        found.append(Unfinished(text(spec.get("name")) or folder.name, answered, totals[str(task)]))
    return sorted(found, key=lambda run: run.name)


def _questions(task: dict[str, object]) -> int | None:
    """Number of questions of a task; None if it is not one of this project's own, or its data are not here."""
    try:
        asked = TaskSpec.model_validate(task)
        if not runs_only_own_code(asked) or (asked.data and not Path(str(asked.data)).is_file()):
            return None
        return read_outline(asked).count
    except (UserError, ValidationError):
        return None
