"""Notes how far a command is, for `qapbench status`, and what failed, in a log."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from qapbench.records.progress_note import LOG_FILE, ProgressNote, RunProgress, note_path, notes_of
from qapbench.records.store import write_json

from .active_run import ActiveRun
from .plan import Planned

EVERY = 2.0  # seconds between two notes
SPAN = 60.0  # seconds over which the speed is measured
ERRORS = 5  # latest errors that a note holds


class Status:
    """How far the runs of one command are.

    Args:
        runs: folder of the results.
        plans: the runs that the command makes.
        engine: where workers run.

    Attributes:
        workers: number of processes that answer.
        log: the file that tracebacks are appended to.
    """

    def __init__(self, runs: Path, plans: Sequence[Planned], engine: str) -> None:
        self.runs, self.log = runs, runs / LOG_FILE
        self.engine, self.workers = engine, 1
        self._plans = {plan.id: plan for plan in plans}
        self._active: dict[str, ActiveRun] = {}
        self._errors: deque[str] = deque(maxlen=ERRORS)
        self._samples: deque[tuple[float, int]] = deque()
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._lock = threading.Lock()

    def watch(self, active_runs: Sequence[ActiveRun]) -> None:
        """Count what these runs have from now on."""
        self._active |= {active.planned.id: active for active in active_runs}

    def failed(self, sentence: str, traceback: str) -> None:
        """Note what failed, and append its traceback to the log."""
        at = datetime.now(UTC).isoformat(timespec="seconds")
        self._errors.append(f"{at} {sentence}")
        with self._lock, contextlib.suppress(OSError), self.log.open("a", encoding="utf-8") as handle:
            handle.write(f"{at} {sentence}\n{traceback.rstrip()}\n\n")

    @contextlib.contextmanager
    def noted(self) -> Iterator[Status]:
        """While the context is open, a file in the folder of the results says every other second how far the runs are.

        It goes when they are made, and stays if they were not.
        """
        for path, note in notes_of(self.runs):
            if note.runs.keys() <= self._plans.keys():  # of an earlier command, which this one continues
                path.unlink(missing_ok=True)
        path = note_path(self.runs, socket.gethostname(), os.getpid())
        ended = threading.Event()
        thread = threading.Thread(target=self._keep_noting, args=(path, ended), daemon=True)
        thread.start()
        try:
            yield self
        except BaseException as error:
            ended.set()
            thread.join()
            self._write(path, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
            raise
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)

    def _keep_noting(self, path: Path, ended: threading.Event) -> None:
        while True:
            self._write(path)
            if ended.wait(EVERY):
                return

    def _write(self, path: Path, ended: str | None = None) -> None:
        """Write the note. Where it cannot be written, the runs go on without."""
        have = {run_id: self._answered(run_id) for run_id in self._plans}
        now, total = time.time(), sum(have.values())
        self._samples.append((now, total))
        while len(self._samples) > 2 and now - self._samples[0][0] > SPAN:
            self._samples.popleft()
        (then, before), more = self._samples[0], len(self._samples) > 1
        note = ProgressNote(
            host=socket.gethostname(),
            pid=os.getpid(),
            engine=self.engine,
            workers=self.workers,
            started=self._started,
            updated=now,
            questions_per_second=(total - before) / (now - then) if more and now > then else None,
            ended=ended,
            errors=list(self._errors),
            runs={
                run_id: RunProgress(name=plan.spec.name, answered=have[run_id], total=plan.total)
                for run_id, plan in self._plans.items()
            },
        )
        with contextlib.suppress(OSError):
            write_json(path, note)

    def _answered(self, run_id: str) -> int:
        active = self._active.get(run_id)
        return len(active.have) if active is not None and active.have else self._plans[run_id].answered
