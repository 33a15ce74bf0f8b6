"""Questions shared between workers: cut, given out, given out again, and stored by one process."""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_questions import QUESTIONS

import qapbench
from benchmarks import scaling
from qapbench import RunSpec, UserError
from qapbench.errors import RunFailedError
from qapbench.records.answer import Answer
from qapbench.records.store import Store
from qapbench.running import batches, execution, scoring
from qapbench.running.crew import Event
from qapbench.running.partition import RETRIES, Schedule, Unit, spreads
from qapbench.running.worker import Failure, Order, Worker, kind_of

Spec = Callable[..., dict[str, Any]]
W4A4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 16}, "activations": {"bits": 4, "group_size": 16}}
SWEEP: list[dict[str, Any]] = [
    {},
    {"quantize": W4A4},
    {"quantize": W4A4, "prune": {"method": "visionzip", "keep": 5}},
    {"quantize": W4A4, "prune": {"method": "random", "keep": 5}},
    {"quantize": {"method": "rtn", "weights": {"bits": 3}}},
    {"prune": {"method": "attention", "keep": 5}},
]
FILES = ("answers.jsonl", "receipt.json", "scored.jsonl")


class Here:
    """Workers of this process, which die, say things twice and say nothing as a test wants.

    Args:
        count: number of workers; one that dies is replaced.
        fault: called with (worker, unit) for every part; "die", "twice" or "".
    """

    again, device = True, None

    def __init__(self, count: int, fault: Callable[[str, Unit], str] = lambda worker, unit: "") -> None:
        self.size, self.fault = count, fault
        self.workers: dict[str, Worker] = {}
        self.said: dict[str, Iterator[Any]] = {}
        self.units: dict[str, Unit] = {}
        self.events_due: deque[Event] = deque()
        self.started = self.died = 0
        self.prepared: list[int] = []

    def prepare(self, threads: int) -> None:
        self.prepared.append(threads)

    def take(self, order: Order) -> None:
        self.order = order
        for worker in self.workers.values():
            worker.take(order)
        self._fill()

    def _fill(self) -> None:
        while len(self.workers) < self.size:
            self.started += 1
            self.workers[str(self.started)] = worker = Worker()
            worker.take(self.order)

    def idle(self) -> list[str]:
        return [name for name in self.workers if name not in self.units]

    def give(self, worker: str, unit: Unit) -> None:
        self.units[worker], self.said[worker] = unit, self.workers[worker].answer(unit)

    def events(self, seconds: float) -> list[Event]:
        found = []
        for name, unit in list(self.units.items()):
            said, fault = next(self.said[name], None), self.fault(name, unit)
            if fault == "die":
                self.died += 1
                self.workers.pop(name).leave()
                failure = Failure("bug", RuntimeError("the worker died"), "it was killed")
                found.append(Event(name, name, self.units.pop(name), failure, lost=True))
                continue
            found += [Event(name, name, unit, said)] * (2 if fault == "twice" and said is not None else 1)
            if said is None or isinstance(said, Failure):
                del self.units[name]
        self._fill()
        return found

    def close(self) -> None:
        for worker in self.workers.values():
            worker.leave()


def made(specs: list[dict[str, Any]], runs: Path, **more: Any) -> list[dict[str, bytes]]:
    more.setdefault("progress", False)
    records = qapbench.run([RunSpec.parse(spec) for spec in specs], runs, **more)
    return [{name: (runs / record.run_id / name).read_bytes() for name in FILES} for record in records]


@pytest.fixture(scope="module")
def specs(tiny_model: Path, questions: Path) -> list[dict[str, Any]]:
    task = {"name": "scienceqa", "data": str(questions)}
    return [{"name": f"row {at}", "model": str(tiny_model), "task": task, **row} for at, row in enumerate(SWEEP)]


@pytest.fixture(scope="module")
def alone(specs: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    return made(specs, tmp_path_factory.mktemp("alone"))


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Here]:
    def use(*arguments: Any) -> Here:
        here = Here(*arguments)
        monkeypatch.setattr(execution, "crew_of", lambda settings: here)
        return here

    return use


def test_answers_are_stored_while_a_task_is_scored(
    specs: Any, alone: Any, crew: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scoring takes seconds where a task has thousands of questions. Here it ends when all answers are on disk."""
    begun, waited, threads = threading.Event(), dict[str, tuple[int, int]](), set[threading.Thread]()
    finish, wanted = scoring.finish, 2 * (QUESTIONS + 6)

    def stored() -> int:
        return sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("*/answers.jsonl"))

    def slow(active: Any, *rest: Any) -> Any:
        threads.add(threading.current_thread())
        before, until = stored(), time.monotonic() + 10
        begun.set()
        while stored() < wanted and time.monotonic() < until:
            time.sleep(0.01)
        waited[active.spec.name] = before, stored()
        return finish(active, *rest)

    def fault(worker: str, unit: Unit) -> str:
        if threading.current_thread() is not threading.main_thread():  # so that the workers have not finished before
            begun.wait(10)
        return ""

    monkeypatch.setattr(scoring, "finish", slow)
    crew(2, fault)
    other = [{**spec, "name": f"short {spec['name']}", "task": {**spec["task"], "limit": 6}} for spec in specs[:2]]
    assert made([*specs[:2], *other], tmp_path, workers=2, batch_size=1)[:2] == alone[:2]
    before, after = waited["row 0"]
    assert 2 * QUESTIONS <= before < after == wanted
    assert threads == {threading.main_thread()}  # metrics may set alarms, which no other thread can


def test_runs_that_were_answered_get_their_records_also_if_the_next_task_fails(
    specs: Any, crew: Any, tmp_path: Path
) -> None:
    """It fails while they are scored."""

    def fault(worker: str, unit: Unit) -> str:
        return "die" if here.died or threading.current_thread() is not threading.main_thread() else ""

    other = [{**spec, "name": f"short {spec['name']}", "task": {**spec["task"], "limit": 6}} for spec in specs[:2]]
    here = crew(2, fault)
    with pytest.raises(RunFailedError, match="the worker died"):
        made([*specs[:2], *other], tmp_path, workers=2)
    assert {record.name for record in qapbench.load_records(tmp_path)} == {"row 0", "row 1"}


@pytest.mark.parametrize("seed", range(2))
def test_workers_that_die_and_say_things_twice_end_with_the_same_bytes(
    seed: int, specs: Any, alone: Any, crew: Any, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    unlucky: dict[tuple[str, int], int] = {}

    def fault(worker: str, unit: Unit) -> str:
        chosen = draw.choice(["", "", "twice", "die"])
        if chosen == "die":  # a unit may be unlucky once
            place = unit.group, unit.chunk
            unlucky[place] = unlucky.get(place, 0) + 1
            return "die" if unlucky[place] < 2 else ""
        return chosen

    here = crew(1 + seed, fault)
    assert made(specs, tmp_path, batch_size=2, workers=2) == alone
    assert here.died > 0


def test_only_the_one_that_gives_the_work_writes(
    specs: Any, alone: Any, crew: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of a run reach its store once each, though two workers said every one of them twice.

    Where only the records are missing, no worker is started.
    """
    lines: list[Answer] = []
    append = Store.append
    monkeypatch.setattr(Store, "append", lambda self, some: lines.extend(some) or append(self, some))
    here = crew(2, lambda worker, unit: "twice")
    told: list[tuple[str, int, int]] = []
    assert made(specs[:3], tmp_path, workers=2, progress=lambda *said: told.append(said)) == alone[:3]
    assert len(lines) == 3 * QUESTIONS
    together = [(done, total) for name, done, total in told if name == "all 3 runs"]
    assert (together[0], together[-1]) == ((0, 3 * QUESTIONS), (3 * QUESTIONS, 3 * QUESTIONS))
    assert together == sorted(together)
    assert here.prepared == [1]

    for record in tmp_path.glob("*/record.json"):
        record.unlink()
    here = crew(2)
    assert made(specs[:3], tmp_path, workers=2) == alone[:3]
    assert (here.prepared, here.started) == ([], 0)


def test_a_question_that_always_fails_is_named_and_its_traceback_kept(
    specs: Any, alone: Any, crew: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows, tried = batches.BatchRunner.rows, []

    def broken(self: Any, question: Any, prompts: Any) -> Any:
        if question.id == "q5":
            tried.append(question)
            raise ZeroDivisionError("a part of nothing")
        return rows(self, question, prompts)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(batches.BatchRunner, "rows", broken)
        crew(2)
        with pytest.raises(RunFailedError, match=r"question 'q5' failed 4 times.*ZeroDivisionError: a part of nothing"):
            made(specs[:1], tmp_path, workers=2, batch_size=4)
    assert len(tried) == RETRIES
    log = (tmp_path / "failures.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "'q5'" in log
    (answers,) = tmp_path.glob("*/answers.jsonl")
    assert len(answers.read_bytes().splitlines()) >= QUESTIONS - 4
    crew(2)
    assert made(specs[:1], tmp_path, workers=2) == alone[:1]


def test_memory_that_runs_out_halves_the_batch_once(
    specs: Any, alone: Any, crew: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    most, results = 2, batches.BatchRunner.results

    def greedy(self: Any, rows: Any, longest: int) -> Any:
        if self.batch_size > most:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 2 bytes.")
        return results(self, rows, longest)

    monkeypatch.setattr(batches.BatchRunner, "results", greedy)
    crew(2)
    with caplog.at_level(logging.WARNING):
        assert made(specs[1:3], tmp_path / "half", workers=2, batch_size=4) == alone[1:3]
    assert caplog.text.count("out of memory with 4 questions together; goes on with 2") == 1
    most = 1
    crew(2)
    with pytest.raises(RunFailedError, match=r"failed 4 times.*--batch-size 1 or a device with more memory helps"):
        made(specs[1:3], tmp_path / "more", workers=2, batch_size=4)


def test_a_mistake_of_the_user_s_is_not_tried_again(
    specs: Any, crew: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def refused(*given: Any) -> Any:
        tried.append(given)
        raise UserError("picture q3 cannot be read")

    monkeypatch.setattr(batches.BatchRunner, "rows", refused)
    crew(1)
    with pytest.raises(UserError, match="picture q3 cannot be read"):
        made(specs[:1], tmp_path, workers=2)
    assert len(tried) == 1


def test_errors_are_told_apart() -> None:
    assert kind_of(UserError("no")) == "told"
    assert kind_of(MemoryError()) == "memory"
    assert kind_of(RuntimeError("CUDA out of memory. Tried to allocate")) == "memory"
    assert kind_of(RuntimeError("shapes differ")) == kind_of(OSError("out of memory")) == "bug"


# -- the schedule --


def units(groups: int, chunks: int) -> list[Unit]:
    return [Unit(f"g{group}", chunk, {"run": (chunk,)}) for group in range(groups) for chunk in range(chunks)]


def test_few_workers_share_a_model_and_keep_their_images() -> None:
    schedule = Schedule(units(3, 8))
    taken: dict[str, list[Unit]] = {"a": [], "b": []}
    while schedule.left:
        for worker, mine in taken.items():
            if (unit := schedule.next(worker)) is not None:
                mine.append(unit)
                schedule.done()
    for mine in taken.values():
        assert [unit.group for unit in mine] == ["g0"] * 4 + ["g1"] * 4 + ["g2"] * 4
        assert len({unit.chunk for unit in mine}) == 4
    assert [unit.later for unit in taken["a"][::4]] == [("g1", "g2"), ("g2",), ()]


def test_many_workers_spread_over_the_models_and_stay() -> None:
    schedule = Schedule([Unit(f"g{at}", one, {"run": tuple(range(99))}) for at in range(4) for one in range(10)], True)
    groups: dict[str, list[str]] = {str(worker): [] for worker in range(8)}
    while schedule.left:
        for worker, mine in groups.items():
            if (unit := schedule.next(worker)) is not None:
                assert unit.later == ()
                mine.append(unit.group)
                schedule.done()
    assert all(mine[:4] == mine[:1] * 4 for mine in groups.values())
    assert sorted(mine[0] for mine in groups.values()) == ["g0", "g0", "g1", "g1", "g2", "g2", "g3", "g3"]


def test_nobody_quantizes_a_model_for_a_few_answers_unless_nobody_else_is_there() -> None:
    schedule = Schedule([Unit("g", at, {"run": tuple(range(4 * at, 4 * at + 4))}) for at in range(3)], spread=True)
    assert schedule.next("a") is not None
    assert schedule.next("b") is None
    schedule.gone("a")
    assert schedule.next("b") is not None


def test_what_a_lost_worker_had_goes_to_another() -> None:
    schedule = Schedule(units(1, 2))
    unit = schedule.next("a")
    assert unit is not None
    schedule.gone("a")
    schedule.again(unit, unit.missing)
    assert schedule.left == 2
    again = schedule.next("b")
    assert again is not None
    assert again.missing == unit.missing


def test_a_unit_that_fails_often_is_parted_into_questions() -> None:
    schedule = Schedule([Unit("g", 0, {"one": (1, 2), "two": (2, 3)}, tried=RETRIES - 2)])
    unit = schedule.next("a")
    assert unit is not None
    schedule.again(unit, unit.missing)
    parts = [schedule.next("a") for _ in range(schedule.waiting)]
    assert [part.missing for part in parts if part] == [{"one": (1,)}, {"one": (2,), "two": (2,)}, {"two": (3,)}]


def test_the_last_units_are_halved() -> None:
    """So that nobody waits for one worker with a whole unit."""
    docs = [tuple(range(16 * at, 16 * at + 16)) for at in range(3)]
    schedule = Schedule([Unit("g", at, {"one": mine, "two": mine[8:]}) for at, mine in enumerate(docs)])
    sizes: list[int] = []
    answered: dict[str, list[int]] = {"one": [], "two": []}
    while schedule.left:
        for worker in "abc":
            if (unit := schedule.next(worker)) is not None:
                sizes.append(len(unit.docs))
                for run, mine in unit.missing.items():
                    answered[run] += mine
                schedule.done()
    assert sizes == [16, 16, 8, 4, 2, 2]
    assert sorted(answered["one"]) == list(range(48))
    assert sorted(answered["two"]) == [doc for mine in docs for doc in mine[8:]]


def test_a_unit_of_which_nothing_is_left_is_done() -> None:
    schedule = Schedule(units(1, 1))
    unit = schedule.next("a")
    assert unit is not None
    schedule.again(unit, {})
    assert schedule.left == 0


@pytest.mark.parametrize(("workers", "groups", "images", "spread"), [(1, 9, 10, False), (2, 3, 200, False)])
def test_few_workers_do_not_spread(workers: int, groups: int, images: int, spread: bool) -> None:
    assert spreads(workers, groups, images) is spread
    assert spreads(64, 10, 2000)
    assert not spreads(64, 1, 10)


def test_the_simulated_cluster_counts_what_is_done_more_than_once() -> None:
    asked = scaling.questions(200, shown=0.5, per_image=2)
    alone, many = (scaling.simulate(scaling.METHODS, 2, asked, workers, scaling.LETTER) for workers in (1, 16))
    assert (alone.quantized, alone.encoded) == (2 * 9, 2 * 50)
    assert alone.busy < alone.wall < 1.1 * alone.busy
    assert many.quantized > alone.quantized
    assert many.encoded > alone.encoded
    assert alone.wall / 16 < many.wall < alone.wall / 4
