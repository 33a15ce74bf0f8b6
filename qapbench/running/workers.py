"""Who answers: this process, or several of this machine; each a share of the questions, for all runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from qapbench.errors import UserError
from qapbench.methods.plugins import load_plugin_file
from qapbench.tasking.questions import Question

from .active_run import ActiveRun
from .plan import Planned
from .session import Session
from .settings import Settings
from .sweep import answer_runs


@dataclass(frozen=True)
class Cost:
    """What one worker spent on a run: questions answered and computed, and seconds by stage."""

    answered: int
    computed: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Order:
    """What one worker process is to do.

    Attributes:
        plugins: files that register what the plans name.
        docs: documents to answer; all where None.
        share: (which, of how many) parts of the questions.
        threads: of torch.
    """

    settings: Settings
    plans: list[Planned]
    plugins: list[str]
    docs: set[int] | None
    share: tuple[int, int]
    threads: int


Done = tuple[dict[str, Cost], dict[str, int]]
"""The cost of each run by id, and the worker's peak memory."""


class WorkerPool:
    """Answers questions for runs of one model and task. Images are never split: who sees one answers all about it.

    Everything that matters is on disk, in stores that take several writers; workers report only progress and cost. A
    pool that is killed leaves what it had answered.
    """

    def __init__(self, session: Session, active_runs: Sequence[ActiveRun]) -> None:
        self.session = session
        self.settings = session.settings
        self.active_runs = {active.planned.id: active for active in active_runs}
        self.peak: dict[str, int] = {}

    def answer(self, active_runs: Sequence[ActiveRun], asked: Sequence[Question] | None) -> None:
        """Answer those questions, all where None, for these runs.

        Raises:
            UserError: a worker process died.
        """
        if not active_runs:
            return
        docs = None if asked is None else {question.place[1] for question in asked}
        workers = self.settings.workers
        if workers == 1:
            self._peak(answer_runs(self.session, active_runs, docs))
            return
        orders = [self._order(active_runs, docs, index) for index in range(workers)]
        for costs, peak in _processes(orders, self._progress(active_runs)):
            self._peak(peak)
            for run_id, cost in costs.items():
                active = self.active_runs[run_id]
                active.answered += cost.answered
                active.computed += cost.computed
                for stage, seconds in cost.seconds.items():
                    active.seconds[stage] += seconds / workers

    def _order(self, active_runs: Sequence[ActiveRun], docs: set[int] | None, index: int) -> Order:
        device, workers = self.settings.device, self.settings.workers
        own = torch.device(f"cuda:{index % torch.cuda.device_count()}") if device.type == "cuda" else device
        plans = [active.planned for active in active_runs]
        return Order(
            settings=dataclasses.replace(self.settings, device=own, workers=1),
            plans=plans,
            plugins=list(dict.fromkeys(plugin for plan in plans for plugin in plan.spec.plugins)),
            docs=docs,
            share=(index, workers),
            threads=max(1, torch.get_num_threads() // workers),
        )

    def _progress(self, active_runs: Sequence[ActiveRun]) -> Callable[[], None]:
        """Says how far each run is, from its store: workers need not report."""

        def report() -> None:
            for active in active_runs:
                self.session.progress(active.spec.name, active.store.count(), active.planned.total)

        return report

    def _peak(self, peak: dict[str, int]) -> None:
        self.peak = {name: max(value, self.peak.get(name, 0)) for name, value in peak.items()}


def work(order: Order) -> Done:
    """Do one worker's share, in its own process."""
    for plugin in order.plugins:
        load_plugin_file(plugin)
    torch.set_num_threads(order.threads)
    active_runs = [ActiveRun(plan) for plan in order.plans]
    peak = answer_runs(Session(order.settings), active_runs, order.docs, order.share)
    costs = {active.planned.id: Cost(active.answered, active.computed, dict(active.seconds)) for active in active_runs}
    return costs, peak


def _processes(orders: Sequence[Order], report: Callable[[], None]) -> Iterator[Done]:
    """Processes of this machine, started afresh (a fork would share locks and GPU contexts)."""
    from concurrent.futures import ProcessPoolExecutor, wait
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    with ProcessPoolExecutor(len(orders), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(work, order) for order in orders]
        left = set(futures)
        while left:
            _, left = wait(left, timeout=1)
            report()
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died (out of memory?); what was answered is kept: run the same command again, "
                "perhaps with fewer --workers"
            ) from None
