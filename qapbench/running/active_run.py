"""A run that is under way: its stored answers, its receipt, and the time that it takes."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qapbench.errors import RunFailedError
from qapbench.receipt import ImageTokens, Receipt
from qapbench.records.answer import Answer
from qapbench.records.intact import RECEIPT, StoredReceipt, stored_receipt
from qapbench.records.store import Store, answers_of, write_json
from qapbench.spec.run_spec import RunSpec
from qapbench.tasking.questions import Question

from .plan import Planned, PruneKey, prune_key

Result = tuple[list[Any], list[ImageTokens]]
"""The outputs of a question's requests, and the token counts of each of its images."""
FLUSH = 0.2  # seconds: a crash may lose the answers of this time and of one batch


@dataclass
class ActiveRun:
    """A run that is under way.

    Attributes:
        planned: the plan of the run.
        have: (task, document) of the questions that are answered.
        answered: number of questions answered in this session.
        computed: how many of them were computed for this run, not taken over from another run with an equal prompt.
        seconds: stage -> this run's share of the time spent on it.
    """

    planned: Planned
    have: set[tuple[str, int]] = field(default_factory=set)
    answered: int = 0
    computed: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _pending: list[Answer] = field(default_factory=list, repr=False)

    @property
    def spec(self) -> RunSpec:
        """The run's spec."""
        return self.planned.spec

    @property
    def store(self) -> Store[Answer]:
        """The store of the run's answers."""
        return answers_of(self.planned.folder)

    @functools.cached_property
    def prune_key(self) -> PruneKey:
        """Hash of how the run prunes; None if it does not. Equal keys select equal tokens of equal images."""
        return prune_key(self.spec)

    def open(self, questions: Sequence[Question], first: Question) -> None:
        """Read which questions are answered.

        Args:
            questions: all questions.
            first: the one that the receipt is measured with. Its answer counts only if the receipt is stored too.
        """
        self.have = set(self.answers(questions))
        stored = stored_receipt(self.planned.folder / RECEIPT)
        if stored is None or stored.group != self.planned.group:  # it is measured again, at the cost of one question
            self.have.discard(first.place)

    def answers(self, questions: Sequence[Question]) -> dict[tuple[str, int], Answer]:
        """The stored answers to some questions, by place. Of several to one question the first counts."""
        place, found = place_among(questions), dict[tuple[str, int], Answer]()
        for answer in self.store.read():
            if (at := place(answer)) is not None:
                found.setdefault(at, answer)
        return found

    def add(self, answer: Answer) -> None:
        """Add an answer, which the next flush will store."""
        self.have.add(answer.place)
        self.answered += 1
        self._pending.append(answer)

    def flush(self) -> None:
        """Write all added answers to disk."""
        if self._pending:
            self.store.append(self._pending)
            self._pending = []

    def write_receipt(self, receipt: Receipt, pruned: Receipt, positions: int | None) -> None:
        """Store what was measured at the first question, so that every session ends with the same receipt.

        The number of calls of a linear is stored as 0 or 1, since runs of a sweep share forward passes.

        Args:
            receipt: what was measured on the quantized model.
            pruned: the receipt of the run's pruning; an empty one if it does not prune.
            positions: number of positions that the model's decoder was made for; None if it is not known.
        """
        lines = [line.model_copy(update={"calls": min(line.calls, 1)}) for line in receipt.linears]
        pruning = self.spec.prune.label if self.spec.prune else None
        more = {"pruning": pruning, "relevance_sign": pruned.relevance_sign, "positions": positions}
        found = [*receipt.fallbacks, *pruned.fallbacks]
        said = receipt.model_copy(update={"linears": lines, "fallbacks": found, **more})
        self.store_receipt(StoredReceipt(group=self.planned.group, receipt=said))

    def store_receipt(self, receipt: StoredReceipt) -> None:
        """Write a receipt to disk."""
        write_json(self.planned.folder / RECEIPT, receipt)

    def read_receipt(self, answers: Sequence[Answer]) -> Receipt:
        """The receipt of the whole run.

        Args:
            answers: all answers of the run, whose images are counted.

        Raises:
            RunFailedError: the stored receipt was lost meanwhile.
        """
        path = self.planned.folder / RECEIPT
        stored = stored_receipt(path)
        if stored is None:
            raise RunFailedError(f"{path} is gone or damaged: the same command measures it again")
        receipt = stored.receipt
        beyond = [answer.positions for answer in answers if answer.positions is not None]
        receipt.recount((image for answer in answers for image in answer.images or []), beyond)
        return receipt


def earlier_results(runs: Path, group: str) -> dict[str, Result]:
    """The stored results of all runs, finished or not, of one quantized model, by content key.

    Args:
        runs: folder of the results.
        group: hash of the quantized model (`Planned.group`).
    """
    found: dict[str, Result] = {}
    for path in sorted(runs.glob(f"*/{RECEIPT}")):
        stored = stored_receipt(path)
        if stored is not None and stored.group == group and ".old" not in path.parent.name:
            with contextlib.suppress(OSError):  # what cannot be read there is computed here
                for answer in answers_of(path.parent).read():
                    if answer.key is not None:
                        found[answer.key] = answer.outputs, answer.images or []
    return found


def place_among(questions: Sequence[Question]) -> Callable[[Answer], tuple[str, int] | None]:
    """A function that gives the place of an answer to one of the questions; None for what is no answer to it.

    An answer has the question's id, and one output of the right kind for each of its requests.
    """
    asked = {question.place: question for question in questions}

    def place(answer: Answer) -> tuple[str, int] | None:
        question = asked.get(answer.place)
        if question is None or (answer.id, len(answer.outputs)) != (question.id, len(question.instances)):
            return None
        fits = all(isinstance(output, str) == question.generates for output in answer.outputs)
        return answer.place if fits else None

    return place


class Clock:
    """Measures the time spent by stage and by run. The time of a stage does not include stages opened inside it.

    Attributes:
        active_runs: the runs that share the time of a stage, unless the stage names others.
    """

    def __init__(self) -> None:
        self.active_runs: Sequence[ActiveRun] = ()
        self._inner = [0.0]

    @contextlib.contextmanager
    def stage(self, name: str, active_runs: Sequence[ActiveRun] | None = None) -> Iterator[None]:
        """Measure the time until the context closes, and share it evenly among runs.

        Args:
            name: name of the stage.
            active_runs: the runs that the stage works for; `self.active_runs` if None.
        """
        started = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            own = spent - self._inner.pop()
            self._inner[-1] += spent
            for active in (sharers := self.active_runs if active_runs is None else active_runs):
                active.seconds[name] += own / len(sharers)
