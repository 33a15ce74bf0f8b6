"""Cuts the missing questions of runs into units of work, and decides which worker gets which.

Nothing here knows where workers run, so `benchmarks.scaling` simulates clusters with this very code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from qapbench.tasking.questions import Question

CHUNKS = 8  # chunks per worker at least, so that the last ones end at about the same time
BATCHES = 32  # batches per chunk at most
VARIANT = 100  # images that could be encoded while a model is quantized once, roughly
WORTH = 16  # answers per worker that a model must have waiting, for another worker to quantize it as well
RETRIES = 4  # times that a unit is tried; before the last two, its questions are parted, to find the one that fails

Missing = dict[str, tuple[int, ...]]
"""Run id -> documents that the run has not answered."""


@dataclass(frozen=True)
class Unit:
    """A piece of work that one worker does at a time: some questions, for all runs of one quantized model.

    Attributes:
        group: the quantized model (`Planned.group`).
        chunk: number of the chunk of questions. Equal numbers stand for the same images in every group.
        missing: what is to be answered.
        later: groups that may ask the same worker about the same images; it keeps their features.
        tried: how often a worker failed at it.
        batch_size: number of questions answered together; set when the unit is given out.
    """

    group: str
    chunk: int
    missing: Missing
    later: tuple[str, ...] = ()
    tried: int = 0
    batch_size: int = 1

    @property
    def docs(self) -> list[int]:
        """The documents that some run has not answered."""
        return sorted(set().union(*self.missing.values()))

    def of(self, docs: set[int]) -> Unit:
        """The unit with some of its documents only."""
        parts = {run: tuple(doc for doc in mine if doc in docs) for run, mine in self.missing.items()}
        return replace(self, missing={run: some for run, some in parts.items() if some})

    def halves(self) -> tuple[Unit, Unit] | None:
        """The unit in two, in the order of its questions; None if it has too few."""
        docs = list(dict.fromkeys(doc for mine in self.missing.values() for doc in mine))
        if len(docs) < 4:
            return None
        return self.of(set(docs[: len(docs) // 2])), self.of(set(docs[len(docs) // 2 :]))


def chunks(questions: Sequence[Question], workers: int, batch_size: int) -> list[list[Question]]:
    """Questions in chunks, in their order. All questions on one image are in one chunk.

    Args:
        questions: the questions, those on one image side by side.
        workers: number of workers that will share them.
        batch_size: number of questions answered together, of which a chunk has a multiple where images allow.
    """
    even = len(questions) // (CHUNKS * max(1, workers))
    size = batch_size * min(BATCHES, max(1, even // batch_size))
    found: list[list[Question]] = []
    for question in questions:
        same = bool(found) and bool(question.images) and found[-1][-1].pictures == question.pictures
        if not found or (len(found[-1]) >= size and not same):
            found.append([])
        found[-1].append(question)
    return found


@dataclass
class _Work:
    """What is left to be given out of one group, and who has the model quantized that way."""

    waiting: list[Unit] = field(default_factory=list)
    workers: set[str] = field(default_factory=set)

    @property
    def answers(self) -> int:
        """Number of answers that wait to be given out."""
        return sum(len(docs) for unit in self.waiting for docs in unit.missing.values())


class Schedule:
    """Gives units to workers that ask for one.

    Few workers go through the quantized models together, one after the other: each encodes its own images once and
    keeps them for the next model. Many workers spread over the models instead, since each would spend longer on
    quantizing every one of them than encoding all images takes. In either case, a worker stays with its model while
    there is work on it, and takes the images first that it has encoded already. Towards the end, when fewer units wait
    than there are workers, units are halved as they are given out, so that all workers end at about the same time.

    Args:
        units: all units, group by group.
        spread: whether workers spread over the models.
    """

    def __init__(self, units: Sequence[Unit], spread: bool = False) -> None:
        self.spread = spread
        self._work: dict[str, _Work] = {}
        for unit in units:
            self._work.setdefault(unit.group, _Work()).waiting.append(unit)
        self._owner: dict[int, str] = {}
        self._workers: set[str] = set()
        self._given = 0

    @property
    def waiting(self) -> int:
        """Number of units that nobody has."""
        return sum(len(work.waiting) for work in self._work.values())

    @property
    def left(self) -> int:
        """Number of units that are not done."""
        return self.waiting + self._given

    def next(self, worker: str) -> Unit | None:
        """The next unit for a worker; None if nothing is waiting that is worth quantizing its model for."""
        self._workers.add(worker)
        group = self._group(worker)
        if group is None:
            return None
        for name, work in self._work.items():
            (work.workers.add if name == group else work.workers.discard)(worker)
        waiting = self._work[group].waiting
        unit = min(waiting, key=lambda unit: self._preference(worker, unit))
        few = self.waiting < len(self._workers)
        waiting.remove(unit)
        if few and (halves := unit.halves()) is not None:
            unit, rest = halves
            waiting.append(rest)
        self._owner.setdefault(unit.chunk, worker)
        self._given += 1
        order = list(self._work)
        return replace(unit, later=() if self.spread else tuple(order[order.index(group) + 1 :]))

    def done(self) -> None:
        """Note that a unit is done."""
        self._given -= 1

    def again(self, unit: Unit, missing: Missing) -> None:
        """Take back what a worker did not finish of a unit.

        Args:
            unit: the unit, with the number of failures so far.
            missing: what is left of it.
        """
        self._given -= 1
        if not missing:
            return
        left = replace(unit, missing=missing)
        parts = [left]
        if unit.tried >= RETRIES - 2 and len(left.docs) > 1:
            parts = [left.of({doc}) for doc in left.docs]
        self._work[unit.group].waiting[:0] = parts

    def gone(self, worker: str) -> None:
        """Forget a worker: what it encoded and quantized is lost."""
        self._workers.discard(worker)
        self._owner = {chunk: owner for chunk, owner in self._owner.items() if owner != worker}
        for work in self._work.values():
            work.workers.discard(worker)

    def _group(self, worker: str) -> str | None:
        """The model that a worker goes on with."""
        open_groups = {name: work for name, work in self._work.items() if work.waiting}
        mine = next((name for name, work in open_groups.items() if worker in work.workers), None)
        if mine is not None or not open_groups:
            return mine
        if not self.spread:
            return next(iter(open_groups))
        share = {name: work.answers / (1 + len(work.workers)) for name, work in open_groups.items()}
        worth = [name for name, work in open_groups.items() if not work.workers or share[name] >= WORTH]
        return max(worth, key=share.__getitem__, default=None)

    def _preference(self, worker: str, unit: Unit) -> tuple[int, int]:
        """Own images first, then those that nobody has, then others' from the end."""
        owner = self._owner.get(unit.chunk)
        if owner == worker:
            return 0, unit.chunk
        return (1, unit.chunk) if owner is None else (2, -unit.chunk)


def spreads(workers: int, groups: int, images: int) -> bool:
    """Whether workers should spread over quantized models.

    If they go through the models together, every worker quantizes every model, and an image is encoded once. If they
    spread, a model is quantized by its share of the workers and one more each, and an image is encoded for every model.

    Args:
        workers: number of workers.
        groups: number of models as quantized.
        images: number of different images.
    """
    return VARIANT * (groups * workers - groups - workers) > images * (groups - 1)


def units_of(missing: Mapping[str, Mapping[str, set[int]]], cut: Sequence[Sequence[Question]]) -> list[Unit]:
    """The units of runs: a unit per quantized model and chunk with something missing.

    Args:
        missing: group -> run id -> documents without an answer.
        cut: the chunks.
    """
    units = []
    for group, runs in missing.items():
        for number, chunk in enumerate(cut):
            docs = {run: tuple(q.place[1] for q in chunk if q.place[1] in lacking) for run, lacking in runs.items()}
            if wanted := {run: some for run, some in docs.items() if some}:
                units.append(Unit(group, number, wanted))
    return units
