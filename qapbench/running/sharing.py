"""Shares the questions of runs between workers, and stores what they find.

This process is the only one that writes answers and receipts. An answer may arrive twice, or never: what has arrived
counts once, and what has not is given out again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from qapbench.errors import RunFailedError
from qapbench.progress import ProgressCallback
from qapbench.tasking.questions import Question
from qapbench.visible import visible_logger

from . import refusals
from .active_run import FLUSH, ActiveRun
from .crew import Crew, Event
from .partition import RETRIES, Missing, Schedule, Unit, chunks, spreads, units_of
from .settings import Settings
from .status import Status
from .worker import Failure, Order, Part

LOG = visible_logger(__name__)
SHARE = 4  # for how many times as long as the last storing took, answers wait at least for the next one


class Sharing:
    """The questions of some runs, while workers answer them.

    Args:
        crew: the workers.
        active_runs: runs of one model and one task, which know what they have.
        questions: all questions of the task.
        settings: where and how runs are made.
        progress: called with (run name, questions answered, questions in all).

    Attributes:
        peak: largest peak memory of a worker.
    """

    def __init__(
        self,
        crew: Crew,
        active_runs: Sequence[ActiveRun],
        questions: Sequence[Question],
        settings: Settings,
        progress: ProgressCallback,
    ) -> None:
        self.crew = crew
        self.active_runs = {active.planned.id: active for active in active_runs}
        self.questions = {question.place: question for question in questions}
        self.progress = progress
        self.peak: dict[str, int] = {}
        self.batch_size = settings.batch_size
        self._halved = False
        self._flushed, self._pause, self._waiting = time.monotonic(), 0.0, False

    def share(
        self,
        order: Order,
        wanted: Sequence[Question],
        status: Status,
        others: deque[Callable[[], None]],
    ) -> None:
        """Let the workers answer questions that some run has not answered.

        Args:
            order: the runs.
            wanted: the questions, in the order of the work.
            status: is told what fails.
            others: pieces of other work. Those that are done meanwhile, one after the other, are taken out.

        Raises:
            RunFailedError: the workers cannot go on, or a question fails whoever tries it.
            NotQuantizedError: a run asks for quantization that never reached a matmul.
            UserError: a worker lacks what the order needs.
        """
        self._report()
        missing = self._missing(wanted)
        if not missing:
            return
        self.crew.take(order)
        schedule = self._schedule(wanted, missing)
        try:
            while schedule.left:
                self._go_on(schedule, status)
                if others:
                    with self._going_on(schedule, status):
                        others.popleft()()
        finally:
            self._flush(force=True)

    def _go_on(self, schedule: Schedule, status: Status) -> None:
        """Give units to the workers that wait for one, and take in and store what is heard within `FLUSH` seconds."""
        for worker in self.crew.idle():
            if (unit := schedule.next(worker)) is not None:
                self.crew.give(worker, replace(unit, batch_size=self.batch_size))
        due = max(0.0, self._flushed + self._pause - time.monotonic()) if self._waiting else FLUSH
        for event in self.crew.events(min(due, FLUSH)):
            self._heard(event, schedule, status)
        status.workers = self.crew.size
        self._flush()

    @contextlib.contextmanager
    def _going_on(self, schedule: Schedule, status: Status) -> Iterator[None]:
        """While the context is open, another thread goes on, so that answers are stored as soon as ever.

        The other work stays in the thread that called: some tasks limit the time of their metrics by signals, which
        only the main thread of a process can do.
        """
        ended = threading.Event()
        failed: list[BaseException] = []

        def go_on() -> None:
            try:
                while schedule.left and not ended.is_set():
                    self._go_on(schedule, status)
                self._flush(force=True)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=go_on, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        for error in failed:
            raise error

    def _missing(self, wanted: Sequence[Question]) -> dict[str, dict[str, set[int]]]:
        """Group -> run id -> documents without an answer; a group or a run that lacks nothing is left out."""
        missing: dict[str, dict[str, set[int]]] = {}
        for run_id, active in self.active_runs.items():
            lacking = {q.place[1] for q in wanted if q.refused is None and q.place not in active.have}
            if lacking:
                missing.setdefault(active.planned.group, {})[run_id] = lacking
        return missing

    def _schedule(self, wanted: Sequence[Question], missing: dict[str, dict[str, set[int]]]) -> Schedule:
        """The units of what is missing."""
        some = {doc for runs in missing.values() for docs in runs.values() for doc in docs}
        asked = [question for question in wanted if question.place[1] in some]
        workers = max(1, self.crew.size)
        images = len({question.pictures for question in asked if question.images})
        units = units_of(missing, chunks(asked, workers, self.batch_size))
        return Schedule(units, spreads(workers, len(missing), images))

    # -- what workers say --

    def _heard(self, event: Event, schedule: Schedule, status: Status) -> None:
        """Take in what was heard of a worker."""
        if isinstance(event.found, Part):
            self._merge(event.found)
            return
        if event.lost:
            schedule.gone(event.worker)
        failure, unit = event.found, event.unit
        if unit is None:
            if failure is not None:
                self._told(failure, event.where, status)
            return
        left = self._left(unit)
        if failure is None and not left:
            schedule.done()
        elif failure is None:
            lacking = Failure("bug", LookupError("a worker left questions out"), "a worker left questions out")
            self._failed(unit, left, lacking, event, schedule, status)
        else:
            self._failed(unit, left, failure, event, schedule, status)

    def _merge(self, part: Part) -> None:
        """Take in what a worker found. Receipts are stored at once, in front of the answers that they go with."""
        for run_id, receipt in part.receipts.items():
            self.active_runs[run_id].store_receipt(receipt)
        for run_id, answers in part.answers.items():
            active = self.active_runs[run_id]
            for answer in answers:
                if answer.place not in active.have:
                    active.add(answer)
                    self._waiting = True
        for run_id, cost in part.costs.items():
            active = self.active_runs[run_id]
            active.computed += cost.computed
            for stage, seconds in cost.seconds.items():
                active.seconds[stage] += seconds / max(1, self.crew.size)
        self.peak |= {name: max(value, self.peak.get(name, 0)) for name, value in part.peak.items()}
        questions = list(self.questions.values())
        refusals.note(questions, {at: why for at, why in part.refused.items() if self.questions[at].refused is None})
        if part.refused:
            refusals.left_out(questions)

    def _left(self, unit: Unit) -> Missing:
        """What of a unit has not arrived."""
        refused = {place[1] for place, question in self.questions.items() if question.refused is not None}
        name = next(iter(self.questions))[0]
        left = {}
        for run_id, docs in unit.missing.items():
            have = self.active_runs[run_id].have
            if some := tuple(doc for doc in docs if doc not in refused and (name, doc) not in have):
                left[run_id] = some
        return left

    # -- failures --

    def _failed(
        self, unit: Unit, left: Missing, failure: Failure, event: Event, schedule: Schedule, status: Status
    ) -> None:
        """Give what is left of a unit out again, unless that would not help.

        Raises:
            RunFailedError: it was tried often enough.
        """
        if failure.kind == "memory" and unit.batch_size > 1 and (not self._halved or unit.batch_size > self.batch_size):
            if unit.batch_size == self.batch_size:
                self._halved = True
                self.batch_size //= 2
                said = f"out of memory with {unit.batch_size} questions together; goes on with {self.batch_size}"
                LOG.warning("%s: %s", event.where, said)
                status.failed(f"{event.where}: {said}", failure.text)
            schedule.again(unit, left)
            return
        asked = self._names(left, failure)
        self._told(failure, event.where, status, asked)
        tried = unit.tried + 1
        if tried >= RETRIES and left:
            raise RunFailedError(self._given_up(failure, asked, tried, status))
        schedule.again(replace(unit, tried=tried), left)

    def _told(self, failure: Failure, where: str, status: Status, asked: str = "") -> None:
        """Tell of a failure, and write its traceback to the log.

        Raises:
            Exception: the failure itself, if no other worker can mend it.
        """
        at = f" at {asked}" if asked else ""
        status.failed(f"{where}{at}: {failure.said}", failure.text)
        if failure.kind == "memory" and not self.crew.again:
            raise RunFailedError(
                f"out of memory{at} with {self.batch_size} question(s) together; what was answered is kept: run the "
                "same command again with a smaller --batch-size, or with fewer --workers"
            )
        if failure.kind == "told" or not self.crew.again:
            raise failure.error
        LOG.warning("%s%s: %s; another worker goes on", where, at, failure.said)

    def _names(self, left: Missing, failure: Failure) -> str:
        """The questions that a worker failed at: those that it names, or what is left of its unit."""
        docs = sorted(set().union(*left.values())) if left else []
        name = next(iter(self.questions))[0]
        names = list(failure.questions) or [self.questions[name, doc].id for doc in docs]
        if not names:
            return ""
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"question{'s' * (len(names) > 1)} {', '.join(repr(one) for one in names[:3])}{more}"

    def _given_up(self, failure: Failure, asked: str, tried: int, status: Status) -> str:
        """The sentence that ends a run at a question that no worker can answer."""
        helps = (
            f"--batch-size {max(1, self.batch_size // 2)} or a device with more memory helps"
            if failure.kind == "memory"
            else f"the traceback is in {status.log}"
        )
        return (
            f"{asked} failed {tried} times, the last time with: {failure.said}; {helps}; what was answered is kept, "
            "and the same command goes on from there"
        )

    # -- storing --

    def _flush(self, force: bool = False) -> None:
        """Write answers to disk, but do not spend most of the time on it."""
        started = time.monotonic()
        if force or started - self._flushed >= self._pause:
            for active in self.active_runs.values():
                active.flush()
            self._report()
            self._flushed, self._waiting = time.monotonic(), False
            self._pause = SHARE * (self._flushed - started)

    def _report(self) -> None:
        """Say how far all runs together are, and each of them."""
        refused = sum(question.refused is not None for question in self.questions.values())
        done = {run_id: len(active.have) + refused for run_id, active in self.active_runs.items()}
        if len(done) > 1:
            total = sum(active.planned.total for active in self.active_runs.values())
            self.progress(f"all {len(done)} runs", sum(done.values()), total)
        for run_id, active in self.active_runs.items():
            self.progress(active.spec.name, done[run_id], active.planned.total)
