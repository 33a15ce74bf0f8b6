"""What one worker does, a process of this machine or an actor on another: it answers units, and stores nothing.

Answers, receipts and costs go to the process that gave the work, which is the only writer of the stores.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal

import torch

from qapbench.errors import RunFailedError, UserError, first_line
from qapbench.memory import peak_memory
from qapbench.methods.plugins import load_plugin_file
from qapbench.receipt import NotQuantizedError
from qapbench.records.answer import Answer
from qapbench.records.intact import StoredReceipt
from qapbench.tasking.questions import Question

from .active_run import FLUSH, ActiveRun
from .partition import Unit
from .plan import Planned
from .quiet import no_foreign_bars
from .session import Session
from .settings import Settings
from .sweep import MEMORY, Sweep

IMPORTED = ["qapbench.tasking.lm", "qapbench.models.loading", "transformers.generation", "datasets"]
"""What every worker needs, besides this module. Importing it computes nothing and touches no GPU."""
Refused = dict[tuple[str, int], str]
"""Task and document of a question that the model's processor refuses -> why."""


@dataclass(frozen=True)
class Order:
    """The runs that a worker answers questions for.

    Attributes:
        settings: settings of the worker, with its own device.
        plans: runs of one model and one task.
        plugins: files that register what the plans name.
        threads: number of torch's threads.
        sharers: number of workers that share the memory of a machine.
    """

    settings: Settings
    plans: list[Planned]
    plugins: list[str]
    threads: int
    sharers: int = 1


@dataclass(frozen=True)
class Cost:
    """The work that one worker did for a run.

    Attributes:
        computed: number of questions that were computed for this run.
        seconds: stage -> seconds.
    """

    computed: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Part:
    """What a worker found since it last said something.

    Attributes:
        answers: run id -> answers.
        receipts: run id -> what was measured at the first question.
        refused: questions that the model's processor does not accept.
        costs: run id -> the work behind it.
        peak: peak memory of the worker so far.
    """

    answers: dict[str, list[Answer]] = field(default_factory=dict)
    receipts: dict[str, StoredReceipt] = field(default_factory=dict)
    refused: Refused = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why a worker did not finish a unit, though it lives.

    Attributes:
        kind: "told" is an error that says what to do, and that no other try would change; "memory" that memory ran
            out; "bug" anything else.
        error: what was raised; of an error that cannot be handed to another process, its text.
        text: its traceback.
        questions: ids of the questions that were under way; empty if none was.
    """

    kind: Literal["told", "memory", "bug"]
    error: Exception
    text: str
    questions: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """The error in one line."""
        name = type(self.error).__name__
        return first_line(self.error) if self.kind == "told" else f"{name}: {first_line(self.error)}"


class SentRun(ActiveRun):
    """A run whose answers and receipt are kept until the worker sends them."""

    receipt: StoredReceipt | None = None

    def open(self, questions: Sequence[Question], first: Question) -> None:
        """Nothing: each unit says what is missing."""

    def flush(self) -> None:
        """Nothing: the worker takes the answers."""

    def store_receipt(self, receipt: StoredReceipt) -> None:
        """Keep a receipt to be sent."""
        self.receipt = receipt

    def taken(self) -> tuple[list[Answer], StoredReceipt | None, Cost]:
        """What came together since this was last called."""
        found = self._pending, self.receipt, Cost(self.computed, dict(self.seconds))
        self._pending, self.receipt, self.computed = [], None, 0
        self.seconds.clear()
        return found


class Worker:
    """Holds a model, quantized as the latest unit asked, and answers units.

    The model stays loaded from one order to the next, and quantized from one unit to the next.
    """

    def __init__(self) -> None:
        self._session: Session | None = None
        self._sweep: Sweep | None = None
        self._runs: dict[str, SentRun] = {}
        self._questions: dict[int, Question] = {}
        self._told: Refused = {}
        self._group: str | None = None
        self._windows: Any = None
        self._open = contextlib.ExitStack()

    def take(self, order: Order) -> None:
        """Load what the units of an order need.

        Raises:
            UserError: a plugin, the model or the data are not there.
            RunFailedError: more questions are refused than a run may leave out.
        """
        self.leave()
        for plugin in order.plugins:
            load_plugin_file(plugin)
        torch.set_num_threads(order.threads)
        self._session = self._session or Session(order.settings)
        self._session.settings = order.settings
        with no_foreign_bars():
            questions = self._session.questions(order.plans[0].spec)
            self._runs = {plan.id: SentRun(plan) for plan in order.plans}
            self._sweep = Sweep(self._session, questions, list(self._runs.values()), MEMORY // order.sharers)
        self._questions = {question.place[1]: question for question in questions}
        self._told = {}

    def answer(self, unit: Unit) -> Iterator[Part | Failure]:
        """Answer the questions of a unit, and hand over what is answered at most `FLUSH` seconds and a batch later.

        Yields:
            What was found, in parts. If the unit cannot be finished, the last one is the failure.
        """
        started = time.monotonic()
        under_way: list[str] = []
        try:
            with no_foreign_bars():
                asked = self._prepare(unit)
                under_way = [q.id for q in asked[: unit.batch_size]]
                for done, _ in enumerate(self._windows(asked), start=1):
                    under_way = [q.id for q in asked[done * unit.batch_size : (done + 1) * unit.batch_size]]
                    if time.monotonic() - started >= FLUSH:
                        yield self._part()
                        started = time.monotonic()
            yield self._part()
        except Exception as error:
            yield self._part()
            self._close_group()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            yield failure_of(error, under_way, kind_of(error))

    def leave(self) -> None:
        """Restore the model, and forget the features of the images."""
        self._close_group()
        if self._sweep is not None:
            self._sweep.feature_cache.close()
        self._sweep = None

    def _prepare(self, unit: Unit) -> list[Question]:
        """Quantize the model as the unit asks, and return the questions."""
        sweep = self._sweep
        assert sweep is not None, "an order comes before its units"
        sweep.batch_size = sweep.batch_runner.batch_size = unit.batch_size
        lacking = {run: set(docs) for run, docs in unit.missing.items()}
        for run_id, run in self._runs.items():
            if run.planned.group == unit.group:
                missing = lacking.get(run_id, set())
                run.have = {q.place for doc, q in self._questions.items() if doc not in missing}
            else:
                run.have = set()
        if self._group != unit.group:
            self._close_group()
            mine = [run for run in self._runs.values() if run.planned.group == unit.group]
            later = [run for run in self._runs.values() if run.planned.group in unit.later]
            self._windows = self._open.enter_context(sweep.quantized([*mine], [*later]))
            self._group = unit.group
        asked = set(unit.docs)
        return [q for q in sweep.questions if q.place[1] in asked and q.refused is None]

    def _close_group(self) -> None:
        self._open.close()
        self._group = self._windows = None

    def _part(self) -> Part:
        assert self._sweep is not None and self._session is not None
        found = {run_id: run.taken() for run_id, run in self._runs.items()}
        refused = {q.place: q.refused for q in self._sweep.questions if q.refused is not None}
        fresh = {place: why for place, why in refused.items() if place not in self._told}
        self._told |= fresh
        return Part(
            answers={run_id: answers for run_id, (answers, _, _) in found.items() if answers},
            receipts={run_id: receipt for run_id, (_, receipt, _) in found.items() if receipt is not None},
            refused=fresh,
            costs={run_id: cost for run_id, (_, _, cost) in found.items() if cost.seconds},
            peak=peak_memory(*self._session.settings.held_on),
        )


def failure_of(
    error: Exception, under_way: Sequence[str] = (), kind: Literal["told", "memory", "bug"] | None = None
) -> Failure:
    """The failure that an error is, while it is handled.

    Args:
        error: the error.
        under_way: ids of the questions that were being answered.
        kind: its kind. None is for an error in front of all questions, which no smaller batch would mend.
    """
    kind = kind or ("told" if kind_of(error) == "told" else "bug")
    text = traceback.format_exc()
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {first_line(error)}\n{text}")
    return Failure(kind, error, text, tuple(under_way))


def kind_of(error: BaseException) -> Literal["told", "memory", "bug"]:
    """What an error means for a unit; see `Failure.kind`."""
    if isinstance(error, UserError | RunFailedError | NotQuantizedError):
        return "told"
    ran_out = isinstance(error, MemoryError | torch.OutOfMemoryError)
    words = ("out of memory", "not enough memory", "can't allocate memory")  # of torch's allocators on a CPU
    if ran_out or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)):
        return "memory"
    return "bug"
