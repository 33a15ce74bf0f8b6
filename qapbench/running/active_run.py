"""One run that is under way: what it has, what it misses, what it cost."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from qapbench.errors import UserError
from qapbench.receipt import ImageTokens, Receipt
from qapbench.records.answer import Answer
from qapbench.records.store import Store, answers_of, write_json
from qapbench.spec.run_spec import RunSpec
from qapbench.tasking.questions import Question

from .plan import Planned, PruneKey, prune_key

RECEIPT = "receipt.json"
Result = tuple[list[Any], list[ImageTokens]]
"""The outputs of one question's requests, and what the language model saw of each of its images."""
FLUSH = 0.2  # seconds of answers that a crash may cost, at most (and one batch)


class StoredReceipt(BaseModel):
    """The receipt that was measured at the first question, and the model as quantized that it is of."""

    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    group: str
    receipt: Receipt


@dataclass
class ActiveRun:
    """A run that is under way.

    Attributes:
        have: places of the questions whose answers are stored.
        seconds: by stage, this run's share of the time spent.
        answered, computed: questions of this session, and those that no other run of the sweep had answered before.
    """

    planned: Planned
    have: set[tuple[str, int]] = field(default_factory=set)
    answered: int = 0
    computed: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _pending: list[Answer] = field(default_factory=list, repr=False)

    @property
    def spec(self) -> RunSpec:
        return self.planned.spec

    @property
    def store(self) -> Store[Answer]:
        return answers_of(self.planned.folder)

    @property
    def prune_key(self) -> PruneKey:
        """How it prunes, by content; equal keys choose equal tokens of equal images."""
        return prune_key(self.spec)

    def open(self, first: Question) -> None:
        """Read what is stored. The first question's answer counts only with the receipt that was measured at it."""
        self.have = {answer.place for answer in self.store.read()}
        if not (self.planned.folder / RECEIPT).exists():
            self.have.discard(first.place)

    def add(self, answer: Answer) -> None:
        """Take up an answer, to be stored with the next flush."""
        self.have.add(answer.place)
        self.answered += 1
        self._pending.append(answer)

    def flush(self) -> None:
        """Put everything that was added on disk."""
        if self._pending:
            self.store.append(self._pending)
            self._pending = []

    def write_receipt(self, receipt: Receipt, fallbacks: Sequence[str]) -> None:
        """Store what was measured at the first question: every session ends with the same receipt.

        Calls are not counted there, as a sweep shares them: 1 says that the linear was used.
        """
        lines = [line.model_copy(update={"calls": min(line.calls, 1)}) for line in receipt.linears]
        pruning = self.spec.prune.label if self.spec.prune else None
        found = [*receipt.fallbacks, *fallbacks]
        said = receipt.model_copy(update={"linears": lines, "fallbacks": found, "pruning": pruning})
        write_json(self.planned.folder / RECEIPT, StoredReceipt(group=self.planned.group, receipt=said))

    def read_receipt(self, answers: Sequence[Answer]) -> Receipt:
        """The receipt of the whole run, its images counted from the stored answers.

        Raises:
            UserError: the stored receipt is damaged.
        """
        path = self.planned.folder / RECEIPT
        try:
            receipt = StoredReceipt.model_validate_json(path.read_text(encoding="utf-8")).receipt
        except (OSError, ValidationError):
            raise UserError(f"{path} is damaged: run the same command with --fresh to make this run anew") from None
        receipt.recount(image for answer in answers for image in answer.images or [])
        return receipt


def earlier_results(runs: Path, group: str) -> dict[str, Result]:
    """Results by content key of every run below `runs`, finished or not, of one model as quantized."""
    found: dict[str, Result] = {}
    for path in sorted(runs.glob(f"*/{RECEIPT}")):
        try:
            same = StoredReceipt.model_validate_json(path.read_text(encoding="utf-8")).group == group
        except (OSError, ValidationError):
            continue
        if same and ".old" not in path.parent.name:
            for answer in answers_of(path.parent).read():
                if answer.key is not None:
                    found[answer.key] = answer.outputs, answer.images or []
    return found


class Clock:
    """Measures where the time goes, by stage and by run; stages inside another are taken out of it."""

    def __init__(self) -> None:
        self.active_runs: Sequence[ActiveRun] = ()
        self.total: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    @contextlib.contextmanager
    def stage(self, name: str, active_runs: Sequence[ActiveRun] | None = None) -> Iterator[None]:
        """Time is shared evenly by the runs that a stage is done for (those of `self.active_runs` where None)."""
        started = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            own = spent - self._inner.pop()
            self._inner[-1] += spent
            self.total[name] += own
            for active in (sharers := self.active_runs if active_runs is None else active_runs):
                active.seconds[name] += own / len(sharers)


def worker_of(question: Question, index: int, workers: int) -> int:
    """The worker that answers a question: all questions on one image go to one worker."""
    if not question.images:
        return index % workers
    text = " ".join(question.pictures)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % workers
