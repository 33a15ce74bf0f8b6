"""The note of how far a command is, which `qapbench status` reads while another process makes the runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

LOG_FILE = "failures.log"
"""The file in the folder of the results that tracebacks of workers are appended to."""


class RunProgress(BaseModel):
    """How far one run is.

    Attributes:
        name: name of the run.
        answered: number of questions answered.
        total: number of questions in all.
    """

    name: str
    answered: int
    total: int


class ProgressNote(BaseModel):
    """How far the runs of one command are.

    Attributes:
        host: machine that the command runs on.
        pid: its process there.
        engine: where workers run.
        workers: number of processes that answer.
        started: time in ISO 8601, UTC.
        updated: time of this note, in seconds since 1970.
        questions_per_second: over the last minute, all runs together; None at the start.
        ended: how the command ended, if it did not make the runs; None while it works.
        errors: the latest failures of workers, each with its time.
        runs: the runs, by id.
    """

    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    host: str
    pid: int
    engine: str
    workers: int
    started: str
    updated: float
    questions_per_second: float | None = None
    ended: str | None = None
    errors: list[str] = []
    runs: dict[str, RunProgress]

    @property
    def missing(self) -> int:
        """Number of answers that are missing, of all runs together."""
        return sum(max(0, run.total - run.answered) for run in self.runs.values())

    @property
    def seconds_left(self) -> float | None:
        """Seconds until everything is answered, at the present speed; None if nothing was answered lately."""
        return self.missing / self.questions_per_second if self.questions_per_second else None


def note_path(runs: Path, host: str, pid: int) -> Path:
    """The file of a command's note.

    Args:
        runs: folder of the results.
        host: the machine.
        pid: the process.
    """
    return runs / f".progress-{host}-{pid}.json"


def notes_of(runs: Path) -> list[tuple[Path, ProgressNote]]:
    """The notes in a folder of results, the latest first. What cannot be read is left out."""
    found = []
    for path in runs.glob(".progress-*.json"):
        try:
            found.append((path, ProgressNote.model_validate_json(path.read_bytes())))
        except (OSError, ValidationError):
            continue
    return sorted(found, key=lambda pair: -pair[1].updated)
