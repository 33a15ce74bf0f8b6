"""Who answers: this process, or several of this machine; each a share of the questions, for all runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qapbench.errors import UserError

from .cells import Cell
from .questions import Question

if TYPE_CHECKING:
    from .engine import Engine

Cost = dict[str, Any]
"""What one worker says of a run: `answered`, `computed`, `seconds` by stage."""


class Crew:
    """Answers questions for runs of one model and task. Images are never split: who sees one answers all about it.

    Everything that matters is on disk, in stores that take several writers; workers report only progress and cost. A
    crew that is killed leaves what it had answered.
    """

    def __init__(self, engine: Engine, cells: Sequence[Cell]) -> None:
        self.engine = engine
        self.cells = {cell.planned.id: cell for cell in cells}
        self.peak: dict[str, int] = {}

    def answer(self, cells: Sequence[Cell], asked: Sequence[Question] | None) -> None:
        """Answer those questions, all where None, for these runs."""
        if not cells:
            return
        docs = None if asked is None else {question.place[1] for question in asked}
        if self.engine.workers == 1:
            self._peak(self.engine.answer(cells, docs))
            return
        orders = [self._order(cells, docs, index) for index in range(self.engine.workers)]
        for costs, peak in _processes(orders, self._progress(cells)):
            self._peak(peak)
            for run_id, cost in costs.items():
                cell = self.cells[run_id]
                cell.answered += cost["answered"]
                cell.computed += cost["computed"]
                for stage, seconds in cost["seconds"].items():
                    cell.seconds[stage] += seconds / self.engine.workers

    def _order(self, cells: Sequence[Cell], docs: set[int] | None, index: int) -> dict[str, Any]:
        device, workers = self.engine.device, self.engine.workers
        name = f"cuda:{index % torch.cuda.device_count()}" if device.type == "cuda" else str(device)
        return {
            "settings": self.engine.settings(name),
            "specs": [cell.spec.model_dump(mode="json") for cell in cells],
            "docs": docs,
            "share": (index, workers),
            "threads": max(1, torch.get_num_threads() // workers),
        }

    def _progress(self, cells: Sequence[Cell]) -> Callable[[], None]:
        """Says how far each run is, from its store: workers need not report."""

        def report() -> None:
            for cell in cells:
                self.engine.report(cell.spec.name, cell.store.count(), cell.planned.total)

        return report

    def _peak(self, peak: dict[str, int]) -> None:
        self.peak = {name: max(value, self.peak.get(name, 0)) for name, value in peak.items()}


def work(order: dict[str, Any]) -> tuple[dict[str, Cost], dict[str, int]]:
    """One worker's share, in its own process: the cost of each run, and peak memory."""
    from qapbench.spec import RunSpec

    from .engine import Engine

    torch.set_num_threads(order["threads"])
    engine = Engine(**order["settings"])
    cells = [Cell(engine.plan(RunSpec.parse(spec), fetch=False)) for spec in order["specs"]]
    peak = engine.answer(cells, order["docs"], order["share"])
    costs = {
        cell.planned.id: {"answered": cell.answered, "computed": cell.computed, "seconds": dict(cell.seconds)}
        for cell in cells
    }
    return costs, peak


Done = tuple[dict[str, Cost], dict[str, int]]


def _processes(orders: Sequence[dict[str, Any]], report: Callable[[], None]) -> Iterator[Done]:
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
