"""One run inside a sweep: what it has, what it misses, what it cost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qapbench.receipt import LinearReceipt, Receipt
from qapbench.spec import RunSpec

from .plan import Planned, look_of
from .questions import Question
from .store import Answer, Store, write_json

RECEIPT = "receipt.json"
Result = tuple[list[Any], list[dict[str, Any]]]
"""The outputs of one question's requests, and what the language model saw of each of its images."""
FLUSH = 0.2  # seconds of answers that a crash may cost, at most (and one batch)


@dataclass
class Cell:
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
    def store(self) -> Store:
        return Store(self.planned.folder)

    @property
    def look(self) -> str | None:
        """How it prunes, by content; equal looks choose equal tokens of equal images."""
        return look_of(self.spec)

    def open(self, first: Question) -> None:
        """Read what is stored. The first question's answer counts only with the receipt that was measured at it."""
        answers = self.store.read()
        self.store.keep(len(answers))
        self.have = {(answer["task"], answer["doc"]) for answer in answers}
        if not (self.planned.folder / RECEIPT).exists():
            self.have.discard(first.place)

    def add(self, answer: Answer) -> None:
        self.have.add((answer["task"], answer["doc"]))
        self.answered += 1
        self._pending.append(answer)

    def flush(self) -> None:
        """Everything that was added, on disk."""
        if self._pending:
            self.store.append(self._pending)
            self._pending = []

    def write_receipt(self, receipt: Receipt, group: str, fallbacks: Sequence[str]) -> None:
        """Store what was measured at the first question: every session ends with the same receipt.

        Calls are not counted there, as a sweep shares them: 1 says that the linear was used.
        """
        lines = [replace(line, calls=min(line.calls, 1)) for line in receipt.linears]
        pruning = self.spec.prune.label if self.spec.prune else None
        found = [*receipt.fallbacks, *fallbacks]
        said = asdict(replace(receipt, linears=lines, fallbacks=found, pruning=pruning, latest=None))
        write_json(self.planned.folder / RECEIPT, {"group": group, "receipt": said})

    def read_receipt(self, answers: Sequence[Answer]) -> Receipt:
        """The receipt of the whole run, its images counted from the stored answers."""
        said = json.loads((self.planned.folder / RECEIPT).read_text(encoding="utf-8"))["receipt"]
        lines = [LinearReceipt(**{**line, "shape": tuple(line["shape"])}) for line in said.pop("linears")]
        receipt = Receipt(linears=lines, **said)
        receipt.recount([image for answer in answers for image in answer.get("images", [])])
        return receipt


def recall(runs: Path, group: str) -> dict[str, Result]:
    """Results by content key of every run below `runs`, finished or not, of one quantizer group."""
    found: dict[str, Result] = {}
    for path in sorted(runs.glob(f"*/{RECEIPT}")):
        try:
            same = json.loads(path.read_text(encoding="utf-8")).get("group") == group
        except ValueError:
            continue
        if same and ".old" not in path.parent.name:
            for answer in Store(path.parent).read():
                if "key" in answer:
                    found[answer["key"]] = answer["outputs"], answer.get("images", [])
    return found


class Clock:
    """Says where the time went, by stage and by run; stages inside another are taken out of it."""

    def __init__(self) -> None:
        self.cells: Sequence[Cell] = ()
        self.total: dict[str, float] = defaultdict(float)
        self._inner = [0.0]

    @contextlib.contextmanager
    def stage(self, name: str, cells: Sequence[Cell] | None = None) -> Iterator[None]:
        """Time is shared evenly by the runs that a stage is done for: `cells`, else those of `self.cells`."""
        started = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            own = spent - self._inner.pop()
            self._inner[-1] += spent
            self.total[name] += own
            for cell in (sharers := self.cells if cells is None else cells):
                cell.seconds[name] += own / len(sharers)


def worker_of(question: Question, index: int, workers: int) -> int:
    """The worker that answers a question: all questions on one image go to one worker."""
    if not question.images:
        return index % workers
    text = " ".join(question.pictures)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % workers
