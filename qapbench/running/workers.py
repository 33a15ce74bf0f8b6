"""Shares the questions of runs between worker processes of this machine, or answers them in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler

import torch

from qapbench.errors import RunFailedError
from qapbench.methods.plugins import load_plugin_file
from qapbench.tasking.questions import Question

from . import refusals
from .active_run import ActiveRun
from .plan import Planned
from .quiet import no_foreign_bars
from .session import Session
from .settings import Settings
from .sweep import answer_runs
from .threads import using_threads

STOP = 5  # seconds in which a worker that is stopped may store what it answered


@dataclass(frozen=True)
class Cost:
    """The work that one worker did for a run.

    Attributes:
        answered: number of questions answered.
        computed: how many of them were computed for this run.
        seconds: stage -> seconds.
    """

    answered: int
    computed: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Order:
    """The work of one worker process.

    Attributes:
        settings: settings of the worker, with its own device.
        plans: runs of one model and one task.
        plugins: files that register what the plans name.
        docs: documents to answer; all if None.
        share: (index, number) of the part of the questions.
        threads: number of torch's threads.
    """

    settings: Settings
    plans: list[Planned]
    plugins: list[str]
    docs: set[int] | None
    share: tuple[int, int]
    threads: int


Refused = dict[tuple[str, int], str]
"""Task and document of a question that the model's processor refuses -> why."""
Done = tuple[dict[str, Cost], dict[str, int], Refused]
"""Run id -> cost, the peak memory of the worker, and the questions that were refused."""


class WorkerPool:
    """Answers questions for runs of one model and one task, in this process or in several.

    All questions on one image go to one worker. Answers go to stores that accept several writers, so workers return
    only costs, and a pool that is killed leaves what it had answered.

    Args:
        session: holds the model if there are no worker processes.
        active_runs: the runs.
        threads: threads of each process that answers.

    Attributes:
        peak: largest peak memory of the processes that answered.
    """

    def __init__(self, session: Session, active_runs: Sequence[ActiveRun], threads: int) -> None:
        self.session = session
        self.threads = threads
        self.settings = session.settings
        self.active_runs = {active.planned.id: active for active in active_runs}
        self.peak: dict[str, int] = {}

    def answer(self, active_runs: Sequence[ActiveRun], asked: Sequence[Question] | None) -> None:
        """Answer questions for some of the runs.

        Args:
            active_runs: the runs.
            asked: the questions; all if None.

        Raises:
            RunFailedError: a worker process died, or more questions are refused than a run may leave out.
            NotQuantizedError: a run asks for quantization that never reached a matmul.
        """
        if not active_runs:
            return
        docs = None if asked is None else {question.place[1] for question in asked}
        questions = self.session.questions(active_runs[0].spec)
        known, found = _refused(questions), Refused()
        if self.settings.workers == 1:
            with using_threads(self.threads):
                self._peak(answer_runs(self.session, active_runs, docs))
            found = _refused(questions)
        else:
            found = self._in_processes(active_runs, docs)
        refusals.note(questions, {place: why for place, why in found.items() if place not in known})
        refusals.left_out(questions)  # all workers together

    def _in_processes(self, active_runs: Sequence[ActiveRun], docs: set[int] | None) -> Refused:
        """Answer questions in worker processes. The questions that they found to be refused are returned.

        Args:
            active_runs: the runs.
            docs: documents to answer; all if None.
        """
        workers, found = self.settings.workers, Refused()
        orders = [self._order(active_runs, docs, index) for index in range(workers)]
        for costs, peak, refused in _processes(orders, self._progress(active_runs)):
            self._peak(peak)
            found |= refused
            for run_id, cost in costs.items():
                active = self.active_runs[run_id]
                active.answered += cost.answered
                active.computed += cost.computed
                for stage, seconds in cost.seconds.items():
                    active.seconds[stage] += seconds / workers
        return found

    def _order(self, active_runs: Sequence[ActiveRun], docs: set[int] | None, index: int) -> Order:
        """The work of the worker with that index."""
        device, workers = self.settings.device, self.settings.workers
        own = torch.device(f"cuda:{index % torch.cuda.device_count()}") if device.type == "cuda" else device
        plans = [active.planned for active in active_runs]
        return Order(
            settings=dataclasses.replace(self.settings, device=own, workers=1),
            plans=plans,
            plugins=list(dict.fromkeys(plugin for plan in plans for plugin in plan.spec.plugins)),
            docs=docs,
            share=(index, workers),
            threads=self.threads,
        )

    def _progress(self, active_runs: Sequence[ActiveRun]) -> Callable[[], None]:
        """A function that reports how far each run is, by counting its stored answers."""

        def report() -> None:
            for active in active_runs:
                self.session.progress(active.spec.name, active.store.count(), active.planned.total)

        return report

    def _peak(self, peak: dict[str, int]) -> None:
        self.peak |= {name: max(value, self.peak.get(name, 0)) for name, value in peak.items()}


def work(order: Order) -> Done:
    """Do the work of one worker. This runs in a process of its own."""
    for plugin in order.plugins:
        load_plugin_file(plugin)
    torch.set_num_threads(order.threads)
    active_runs = [ActiveRun(plan) for plan in order.plans]
    with no_foreign_bars():
        session = Session(order.settings)
        peak = answer_runs(session, active_runs, order.docs, order.share)
    costs = {active.planned.id: Cost(active.answered, active.computed, dict(active.seconds)) for active in active_runs}
    return costs, peak, _refused(session.questions(active_runs[0].spec))


def _refused(questions: Sequence[Question]) -> Refused:
    return {question.place: question.refused for question in questions if question.refused is not None}


def _processes(orders: Sequence[Order], report: Callable[[], None]) -> list[Done]:
    """Run the orders in new processes, and return what each returns.

    Processes are spawned, since forked ones would share locks and GPU contexts. The first one that fails stops the
    others.

    Args:
        orders: one per process.
        report: called about every second.

    Raises:
        RunFailedError: a process died.
    """
    context = get_context("spawn")
    processes: dict[Connection, BaseProcess] = {}
    done: list[Done] = []
    try:
        for order in orders:
            receiver, sender = context.Pipe(duplex=False)
            processes[receiver] = process = context.Process(target=_serve, args=(order, sender), daemon=True)
            process.start()
            sender.close()  # so that the death of the process closes the pipe
        left = set(processes)
        while left:
            ready = wait(list(left), timeout=1)
            for receiver in left.intersection(ready):
                done.append(_received(receiver, processes[receiver]))
                left = left - {receiver}
            report()
        return done
    finally:
        _stop(list(processes.values()))


def _received(receiver: Connection, process: BaseProcess) -> Done:
    """What a process returned. What it raised is raised here."""
    try:
        found: Done | BaseException = receiver.recv()
    except (EOFError, OSError):
        found = SystemExit()
    if isinstance(found, SystemExit):
        process.join()
        code = process.exitcode or 0
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        raise RunFailedError(
            f"a worker process died ({how}; out of memory?); what was answered is kept: run the same command again, "
            "perhaps with fewer --workers"
        )
    if isinstance(found, BaseException):
        raise found
    return found


def _stop(processes: Sequence[BaseProcess]) -> None:
    """End processes. They have a moment to store what they answered."""
    running = [process for process in processes if process.pid is not None]
    for process in running:
        process.terminate()
    for process in running:
        process.join(STOP)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(order: Order, sender: Connection) -> None:
    """Do the work of one worker, and send what it returns or raises. This is a process of its own."""
    signal.signal(signal.SIGTERM, _exit)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        found: Done | BaseException = work(order)
    except BaseException as error:
        error.add_note(traceback.format_exc())
        found = error
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the work is done: a signal would only put a traceback on the screen
    try:
        data = ForkingPickler.dumps(found)
        ForkingPickler.loads(data)
    except Exception:  # an error that cannot be handed to another process
        data = ForkingPickler.dumps(RuntimeError("\n".join(getattr(found, "__notes__", [repr(found)]))))
    with contextlib.suppress(OSError):  # nobody listens any more
        sender.send_bytes(data)


def _exit(*_: object) -> None:
    """End a worker as an exception does, so that it stores what it answered."""
    raise SystemExit(1)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: nobody would wait for its answers."""
    if parent := parent_process():
        parent.join()
        os._exit(1)
