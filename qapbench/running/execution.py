"""Makes runs of one model and one task after the other, with one session and one crew of workers."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qapbench.errors import UserError
from qapbench.progress import ProgressCallback
from qapbench.records.record import Record, read_record, write_record

from .engines import crew_of
from .plan import Planned
from .settings import Settings

if TYPE_CHECKING:
    from qapbench.tasking.tasks import LoadedTask

    from .active_run import ActiveRun
    from .crew import Crew
    from .fast import Verdict
    from .session import Session
    from .status import Status


class Execution:
    """Makes runs with one session, so that what they share is computed once.

    Args:
        settings: where and how runs are made.
        progress: called with (run name, questions answered, questions in all).
        status: is told how far the runs are, and what fails.
        session: a session to use; a new one if None.
        crew: workers that begin to start already; those that the settings ask for if None.
    """

    def __init__(
        self,
        settings: Settings,
        progress: ProgressCallback,
        status: Status,
        session: Session | None = None,
        crew: Crew | None = None,
    ) -> None:
        from .session import Session

        self.settings = settings
        self.status = status
        self.session = session or Session(settings, progress)
        self.session.settings = settings
        self.crew = crew or crew_of(settings)
        self._unfinished: deque[Callable[[], None]] = deque()
        self._closing: Future[None] | None = None

    def finish(self) -> None:
        """Score the runs that were answered and write their records, as far as it was not done meanwhile."""
        while self._unfinished:
            self._unfinished.popleft()()

    def dismiss(self) -> None:
        """Begin to end the workers: all is answered. It may take seconds, in which this process scores."""
        if self.crew is not None and self._closing is None:
            closer = ThreadPoolExecutor(1, "end workers")
            self._closing = closer.submit(self.crew.close)
            closer.shutdown(wait=False)

    def close(self) -> None:
        """End the workers."""
        if self._closing is not None:
            self._closing.result()
        elif self.crew is not None:
            self.crew.close()

    def make(self, plans: Sequence[Planned], fast_first: bool) -> None:
        """Make runs of one model and one task. They are answered then, and `finish` writes their records.

        With workers, the runs that were answered before are scored meanwhile, so that no worker waits for that.

        Args:
            plans: the runs.
            fast_first: ask a subset first, and stop the rows that are out of reach there.
        """
        from qapbench.models.loading import precision

        from . import fast, scoring
        from .active_run import ActiveRun
        from .threads import threads_of
        from .workers import WorkerPool

        spec, devices = plans[0].spec, self.settings.held_on
        if devices[0].type == "cuda" and self.crew is None:
            for device in devices:
                torch.cuda.reset_peak_memory_stats(device)
        active_runs = [ActiveRun(plan) for plan in plans]
        self.status.watch(active_runs)
        threads = threads_of(spec, self.settings)
        if self.crew is not None and any(plan.answered < plan.total for plan in plans):
            self.crew.prepare(threads)
        processor, task = self.session.processor(spec), self.session.task(spec)
        questions = self.session.questions(spec)
        pool = WorkerPool(self.session, processor, threads, self.crew, self.status, self._unfinished)
        stopped: dict[str, Verdict] = {}
        some = fast.subset(questions) if fast_first else questions
        if len(some) < len(questions):
            pool.answer(active_runs, some)
            rights = [self._rights(active, task, processor, some) for active in active_runs]
            stopped = fast.stopped(active_runs, rights)
        pool.answer([active for active in active_runs if active.planned.id not in stopped], None)
        machine = {
            "batch_size": self.settings.batch_size,
            "workers": self.crew.size if self.crew else 1,
            "threads": threads,
            "engine": self.settings.engine,
            "dtype": precision(spec, devices[0]),
            "image_processor": type(processor.image_processor).__name__,
        }
        if self.crew is not None and self.crew.device is not None:
            machine["device"] = self.crew.device
        self.finish()

        def score(active: ActiveRun) -> None:
            verdict = stopped.get(active.planned.id)
            had = active.answers(questions)
            asked = [q for q in questions if q.refused is None and (q.place in had or not verdict)]
            refused = [q for q in (some if verdict else questions) if q.refused is not None]
            why = verdict.record(len(asked), len(questions)) if verdict else None
            record = scoring.finish(active, task, asked, refused, processor, machine, devices, why, pool.peak)
            write_unless_kept(active.planned.folder, record.named(active.spec.name))

        self._unfinished += [functools.partial(score, active) for active in active_runs]
        if self.crew is None:
            self.finish()

    def _rights(self, active: ActiveRun, task: LoadedTask, processor: Any, asked: Sequence[Any]) -> dict[str, bool]:
        """For each question of a subset, whether a run answered it right by the task's score.

        A question without a score of 0 or 1 is left out.
        """
        from qapbench.tasking.scores import score

        unique = {answer.doc: answer for answer in active.answers(asked).values()}
        scores = score(list(unique.values()), task, processor, active.spec.seed, sorted(unique))
        name = task.score or scores.columns[-1]
        return {one.id: one.metrics[name] == 1 for one in scores.questions if one.metrics.get(name) in (0, 1)}


def write_unless_kept(folder: Path, record: Record) -> None:
    """Write a record, unless the one that is there says the same: a mended run is then as it was, to the byte."""
    try:
        kept: Record | None = read_record(folder)
    except UserError:
        kept = None
    if kept is None or not kept.made_alike(record):
        write_record(folder, record)
