"""How a sweep scales to 64 workers, by a simulation of a cluster with measured times.

    python -m benchmarks.scaling                      tables of 10 rows and 5 tasks on a 13B model, assumed times
    python -m benchmarks.scaling --measure            times of this machine and the embedded model instead
    python -m benchmarks.scaling --times times.json --questions 2000

Every simulated worker asks `qapbench.running.partition.Schedule`, the code that a real run asks, for its next unit, and
spends on it what the times say: it loads the model once, quantizes it whenever it takes up another one, encodes images
that it has not kept, chooses tokens for each pruned row, and answers for each row. The sharing that is lost to the
partition is counted with that: an image that several workers encode, and a model that several workers quantize. The
driver merges what it is sent, one part after the other, and then gives out the next unit; when nobody waits for it, it
scores a row of the task before. It scores the last task by itself while nobody works.

Efficiency is the time that one worker needs, divided by the number of workers and by their time. The times of a 13B
model that are built in are assumptions, which stand below each table; `--measure` finds those of this machine, and a
JSON file (`--times`) holds those of another.
"""

from __future__ import annotations

import argparse
import heapq
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from rich.console import Console
from rich.table import Table

from qapbench.running.partition import Schedule, chunks, spreads, units_of

BATCH = 8
WORKERS = (1, 2, 4, 8, 16, 32, 64)
out = Console(width=120, highlight=False)


@dataclass(frozen=True)
class Times:
    """Seconds that steps take.

    Attributes:
        start: until a new worker has imported everything and loaded the model.
        quantize: quantizing the loaded model once, calibration included.
        encode: an image through tower and projector, with the choice of tokens of all rows.
        dense: an answer to a question with an image and all tokens.
        pruned: an answer to a question with pruned tokens.
        text: an answer to a question without an image, once for all rows of a model.
        hand: giving out a unit and hearing of its end.
        merge: what the driver does for one answer: check, store and sync.
        score: what the driver does for one answer at the end of a task.
    """

    start: float
    quantize: float
    encode: float
    dense: float
    pruned: float
    text: float
    hand: float
    merge: float
    score: float


LETTER = Times(90.0, 20.0, 0.08, 0.35, 0.15, 0.12, 0.005, 0.00035, 0.0006)
"""A 13B model in bfloat16 with fake quantization on a data-centre GPU, answered by the most likely letter: the order of
magnitude of prefills of 600 and of 64 tokens. `merge` and `score` were measured on a CPU, as processor time."""
GENERATED = replace(LETTER, dense=1.6, pruned=1.2, text=1.2)
"""The same with some twenty tokens generated per answer, which makes the sweep take days on one GPU."""


@dataclass(frozen=True)
class Row:
    """One row of the table: the model as quantized, and whether it prunes."""

    group: str
    pruned: bool


TABLE1 = [
    Row("full", False),
    *(Row("W4A4", pruned) for pruned in (False, True, True, True, True)),
    *(Row("W3A3", pruned) for pruned in (False, True, True, True)),
]
"""Ten rows: full precision, and two formats of which each has a dense row and pruned ones."""
METHODS = [Row("full" if at == 0 else f"method {at}", at > 0) for at in range(10)]
"""Ten rows, of which all but the first quantize by a method of their own: the least shared work."""


def questions(count: int, shown: float, per_image: int) -> list[Any]:
    """Questions with what `chunks` looks at: documents, of which a share has images, some of them in common."""
    with_image = int(count * shown)
    return [
        SimpleNamespace(images=[at] if at < with_image else [], pictures=(str(at // per_image),), place=("task", at))
        for at in range(count)
    ]


@dataclass
class Spent:
    """What a simulated cluster spent, in seconds.

    Attributes:
        wall: from the start to the last score.
        busy: on the work itself, all workers together.
        quantized: how often a model was quantized.
        encoded: how often an image was encoded.
    """

    wall: float = 0.0
    busy: float = 0.0
    quantized: int = 0
    encoded: int = 0


def simulate(rows: Sequence[Row], tasks: int, asked: Sequence[Any], workers: int, times: Times) -> Spent:
    """Simulate the runs of some rows on several tasks of equal size, one task after the other.

    Args:
        rows: the rows.
        tasks: number of tasks.
        asked: the questions of each task.
        workers: number of workers.
        times: what steps take.
    """
    by_doc = {question.place[1]: question for question in asked}
    groups: dict[str, dict[str, bool]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.group, {})[str(number)] = row.pruned
    images = len({question.pictures for question in asked if question.images})
    spent = Spent(busy=workers * times.start)
    driver = now = times.start
    to_score = 0  # rows of the task before this one
    for _ in range(tasks):
        missing = {group: {run: set(by_doc) for run in runs} for group, runs in groups.items()}
        units = units_of(missing, chunks(asked, workers, BATCH))
        schedule = Schedule(units, spreads(workers, len(groups), images))
        has: dict[str, str] = {}
        kept: dict[str, set[str]] = {}
        free = [(now, str(worker), 0) for worker in range(workers)]  # with the answers that the worker then hands over
        while free:
            at, worker, answers = heapq.heappop(free)
            while to_score and driver < at:  # nobody waits for the driver
                driver, to_score = driver + times.score * len(asked), to_score - 1
            driver = max(driver, at) + times.merge * answers
            unit = schedule.next(worker)
            if unit is None:  # nothing is left for it in this task
                continue
            took = times.hand
            if has.get(worker) != unit.group:
                took += times.quantize if unit.group != "full" else 0.0
                spent.quantized += unit.group != "full"
                has[worker] = unit.group
            chunk = [by_doc[doc] for doc in unit.docs]
            seen = kept.setdefault(worker, set())
            fresh = {one.pictures[0] for one in chunk if one.images} - seen
            if unit.later:
                seen |= fresh
            spent.encoded += len(fresh)
            took += len(fresh) * times.encode
            for one in chunk:
                runs = groups[unit.group].values()
                took += sum(times.pruned if pruned else times.dense for pruned in runs) if one.images else times.text
            spent.busy += took
            schedule.done()
            heapq.heappush(free, (driver + took, worker, len(chunk) * len(unit.missing)))
        driver += times.score * len(asked) * to_score
        now, to_score = driver, len(rows)
    spent.wall = now + times.score * len(asked) * to_score
    return spent


def measure(folder: Path, limit: int) -> Times:
    """The times of this machine, with the embedded model, from the stages of a run and from the driver's own steps."""
    from qapbench.records.answer import Answer
    from qapbench.records.store import Store
    from qapbench.running import scoring
    from qapbench.running.execute import make_runs
    from qapbench.running.session import Session
    from qapbench.running.settings import Settings, find_device
    from qapbench.spec.spec_file import load_spec

    specs = load_spec("quickstart", [f"task.limit={limit}"])
    session = Session(Settings(folder, find_device("cpu"), BATCH))
    started = time.perf_counter()
    session.model(specs[0])
    start = time.perf_counter() - started
    finish, scored = scoring.finish, []

    def timed(*given: Any) -> Any:
        started = time.perf_counter()
        record = finish(*given)
        scored.append(time.perf_counter() - started)
        return record

    with mock.patch.object(scoring, "finish", timed):
        records = make_runs(specs, session.settings, session=session)
    stages: dict[str, float] = {}
    for record in records:
        for name, seconds in record.timing.stages.items():
            stages[name] = stages.get(name, 0.0) + seconds
    asked = session.questions(specs[0])
    shown = sum(bool(question.images) for question in asked)
    images = len({question.pictures for question in asked if question.images})
    pruned = sum(spec.prune is not None for spec in specs)
    groups = len({str(spec.quantize) for spec in specs})
    store = Store(folder / records[0].run_id, Answer)
    answers = store.read()
    other = Store(folder / "merged", Answer)
    other.folder.mkdir()
    started = time.perf_counter()
    for at in range(0, len(answers), BATCH):
        other.append(answers[at : at + BATCH])
    merge = (time.perf_counter() - started) / len(answers)
    return Times(
        start=start,
        quantize=stages.get("quantize", 0.0) / groups,
        encode=(stages.get("vision", 0.0) + stages.get("choose", 0.0)) / images,
        dense=stages.get("dense", 0.0) / (shown * (len(specs) - pruned)),
        pruned=stages.get("pruned", 0.0) / (shown * pruned),
        text=stages.get("text", 0.0) / max(1, (len(asked) - shown) * groups),
        hand=LETTER.hand,
        merge=merge,
        score=sum(scored[1:]) / (len(asked) * (len(scored) - 1)),  # the first one imports what scoring needs
    )


def show(name: str, rows: Sequence[Row], tasks: int, asked: Sequence[Any], times: Times) -> None:
    """Print the table of one set of rows."""
    table = Table(title=f"{name}, {tasks} tasks of {len(asked)} questions", title_justify="left")
    for column in ("workers", "hours", "efficiency", "models quantized", "images encoded", "waiting"):
        table.add_column(column, justify="right")
    alone = simulate(rows, tasks, asked, 1, times)
    for workers in WORKERS:
        spent = simulate(rows, tasks, asked, workers, times)
        table.add_row(
            str(workers),
            f"{spent.wall / 3600:.2f}",
            f"{alone.wall / (workers * spent.wall):.3f}",
            str(spent.quantized),
            str(spent.encoded),
            f"{1 - spent.busy / (workers * spent.wall):.1%}",
        )
    out.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=4241, help="per task; ScienceQA's test split has 4241")
    parser.add_argument("--shown", type=float, default=0.48, help="share of them with an image")
    parser.add_argument("--per-image", type=int, default=1, help="questions on each image")
    parser.add_argument("--tasks", type=int, default=5)
    parser.add_argument("--times", type=Path, help=f"JSON with {', '.join(field.name for field in fields(Times))}")
    parser.add_argument("--measure", action="store_true", help="measure the times here, with the embedded model")
    parser.add_argument("--limit", type=int, default=60, help="questions that are measured")
    given = parser.parse_args()
    known = {"13B, letters": LETTER, "13B, generated answers": GENERATED}
    if given.times:
        known = {given.times.stem: Times(**json.loads(given.times.read_text()))}
    elif given.measure:
        with tempfile.TemporaryDirectory() as folder:
            known = {"measured here": measure(Path(folder), given.limit)}
    asked = questions(given.questions, given.shown, given.per_image)
    for name, times in known.items():
        show(f"{name}: ten rows in three models as quantized", TABLE1, given.tasks, asked, times)
        show(f"{name}: nine methods that quantize, and full precision", METHODS, given.tasks, asked, times)
        out.print(f"seconds: {', '.join(f'{name} {value:.4g}' for name, value in asdict(times).items())}")


if __name__ == "__main__":
    main()
