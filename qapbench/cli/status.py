"""The command `status`: how far runs are that another process makes, or made."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from qapbench.errors import UserError, nearest

from .console import RunsOption, out

if TYPE_CHECKING:
    from qapbench.records.progress_note import ProgressNote

HEARD = 15.0  # seconds without a note, after which a command is taken for dead; it writes one every other second


@dataclass(frozen=True)
class Standing:
    """How far one run is.

    Attributes:
        run_id: its id.
        name: its name.
        state: "done" and "stopped" have a record; "running" is made now; "begun" waits for somebody to go on.
        answered: number of questions answered.
        total: number of questions in all; None if nobody said.
    """

    run_id: str
    name: str
    state: Literal["done", "stopped", "running", "begun"]
    answered: int
    total: int | None


def status(
    run: Annotated[
        str | None, typer.Argument(help="A run's id, or how it begins, its name, or its folder; all runs if left out.")
    ] = None,
    runs: RunsOption = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how far a run is: questions answered, speed, time left, and what failed last.

    It reads what the process that makes the run notes down, so it can be called from anywhere that sees the folder.

    \b
    Examples:
      qapbench status --runs runs
      qapbench status "W4A4 dense" --json
    """
    from qapbench.records.progress_note import LOG_FILE, notes_of

    if run is not None and Path(run).is_dir() and Path(run).resolve().parent.is_dir():
        folder = Path(run).resolve()
        run, runs = folder.name, folder.parent
    if not runs.is_dir():
        raise UserError(f"--runs {runs}: there is no such folder")
    notes = [note for _, note in notes_of(runs)]
    standings = _standings(runs, notes, run)
    if run is not None and not standings:
        known = [word for one in _standings(runs, notes, None) for word in (one.name, one.run_id)]
        raise UserError(f"{runs} has no run '{run}'; {nearest(run, known)}")
    ids = {one.run_id for one in standings}
    mine = [note for note in _current(notes) if note.runs.keys() & ids]
    if as_json:
        commands = [
            {**note.model_dump(mode="json"), "alive": _alive(note), "seconds_left": note.seconds_left} for note in mine
        ]
        typer.echo(json.dumps({"runs": [asdict(one) for one in standings], "commands": commands}))
        return
    table = Table("run", "id", "state")
    table.add_column("answered", justify="right")
    for one in standings:
        total = f"{one.answered} of {one.total}" if one.total is not None else str(one.answered)
        table.add_row(escape(one.name), one.run_id, one.state, total)
    out.print(table)
    for note in mine:
        for line in _lines(note):
            out.print(escape(line), highlight=False, soft_wrap=True)
        if note.errors:
            out.print(escape(f"last failures, with tracebacks in {runs / LOG_FILE}:"), highlight=False, soft_wrap=True)
        for error in note.errors:
            out.print(escape(f"  {error}"), highlight=False, soft_wrap=True)


def _current(notes: list[ProgressNote]) -> list[ProgressNote]:
    """The notes, latest first, without those of commands that ended and whose runs later commands have taken up."""
    found: list[ProgressNote] = []
    taken: set[str] = set()
    for note in notes:
        if _alive(note) or note.runs.keys() - taken:
            found.append(note)
        taken |= note.runs.keys()
    return found


def _standings(runs: Path, notes: list[ProgressNote], wanted: str | None) -> list[Standing]:
    """The runs of a folder that a word stands for, those that are made now first."""
    ids = [run_id for note in notes for run_id in note.runs]
    ids += sorted(path.parent.name for path in runs.glob("*/spec.json") if ".old" not in path.parent.name)
    found = [_standing(runs, run_id, notes) for run_id in dict.fromkeys(ids)]
    if wanted is None:
        return found
    return [one for one in found if wanted == one.name or one.run_id.startswith(wanted)]


def _standing(runs: Path, run_id: str, notes: list[ProgressNote]) -> Standing:
    """How far a run is, by its record, the notes, and its stored answers."""
    from qapbench.records.record import RECORD, read_record
    from qapbench.records.store import answers_of

    folder = runs / run_id
    note = next((note for note in notes if run_id in note.runs), None)
    noted = note.runs[run_id] if note else None
    alive = note is not None and _alive(note)
    if (folder / RECORD).is_file():
        try:
            record = read_record(folder)
        except UserError:
            record = None
        if record is not None and not (alive and noted and noted.answered < noted.total):
            number = record.task.questions if record.task else answers_of(folder).count()
            if record.stopped:
                return Standing(run_id, record.name, "stopped", record.stopped.asked, record.stopped.of)
            return Standing(run_id, record.name, "done", number, number + len(record.unanswered))
    answered = max(answers_of(folder).count(), noted.answered if noted else 0)
    if noted is not None:
        return Standing(run_id, noted.name, "running" if alive else "begun", answered, noted.total)
    return Standing(run_id, _name(folder), "begun", answered, None)


def _name(folder: Path) -> str:
    try:
        return str(json.loads((folder / "spec.json").read_text(encoding="utf-8")).get("name", folder.name))
    except (OSError, ValueError, AttributeError):
        return folder.name


def _alive(note: ProgressNote) -> bool:
    return note.ended is None and time.time() - note.updated < HEARD


def _lines(note: ProgressNote) -> list[str]:
    """What a command as a whole is doing."""
    total = sum(run.total for run in note.runs.values())
    done = total - note.missing
    who = f"process {note.pid} on {note.host}, engine {note.engine}, {note.workers} worker(s), since {note.started}"
    if note.ended is not None:
        return [f"{done} of {total} answers; {who}; it ended with: {note.ended}"]
    heard = time.time() - note.updated
    if not _alive(note):
        return [
            f"{done} of {total} answers; {who}; not heard of for {heard:.0f} s: the same command goes on from there"
        ]
    speed = f"{note.questions_per_second:.1f} questions/s" if note.questions_per_second else "no speed yet"
    left = note.seconds_left
    return [f"{done} of {total} answers, {speed}, {_words(left) if left is not None else 'unknown time'} left; {who}"]


def _words(seconds: float) -> str:
    """A time in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
