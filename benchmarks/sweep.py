"""Time that a sweep takes, compared to its runs one by one.

    python -m benchmarks.sweep --task diagramqa --limit 60

The sweep is the spec `table2_w4a4` with its 12 runs, on a model of LLaVA's architecture with about 100 million random
weights, which is loaded beforehand. First, the run "W4A4 dense" is computed alone (with `--alone all`, every run), then
the whole sweep. Times are given as CPU time of this process, which other work on the machine affects less, and as wall
time.

With `--count`, the multiply-adds of matrix products and attention are counted instead of times. Their ratio is the best
that any machine can reach.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from qapbench.records.record import Record
from qapbench.running.execute import make_runs
from qapbench.running.session import Session
from qapbench.running.settings import Settings, find_device
from qapbench.spec.run_spec import RunSpec
from qapbench.spec.spec_file import load_spec
from qapbench.spec.task_spec import TaskSpec
from qapbench.tasking.tasks import load_task

from . import random_llava

DENSE = "W4A4 dense"
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # PyTorch's counter does not count it
out = Console(width=120, highlight=False)


def timed(session: Session, runs: Path, specs: list[RunSpec]) -> tuple[float, float, list[Record]]:
    """Run specs with a loaded model. Returns the CPU seconds, the wall seconds, and the records."""
    settings = dataclasses.replace(session.settings, runs=runs)
    wall, cpu = time.perf_counter(), time.process_time()
    records = make_runs(specs, settings, session=session)
    return time.process_time() - cpu, time.perf_counter() - wall, records


def count_products(specs: list[RunSpec], alone: RunSpec, folder: Path, batch_size: int) -> None:
    """Count and print the multiply-adds of the sweep and of the dense run alone.

    Args:
        specs: the runs of the sweep.
        alone: the run that is also computed alone.
        folder: folder for records.
        batch_size: number of questions in a batch.
    """
    session = Session(Settings(folder / "unused", find_device(None), batch_size))
    session.model(specs[0])
    found = {}
    for name, asked in (("alone", [alone]), ("sweep", specs)):
        with FlopCounterMode(display=False, custom_mapping={ATTENTION: _attention}) as counter:
            timed(session, folder / f"count-{name}", asked)
        found[name] = counter.get_total_flops() / 2
    out.print(f"multiply-adds: dense run alone {found['alone']:.3g}, sweep {found['sweep']:.3g}")
    out.print(f"sweep / dense run alone: {found['sweep'] / found['alone']:.2f}")


def measure(specs: list[RunSpec], alone: list[RunSpec], folder: Path, batch_size: int) -> None:
    """Measure and print the time of the sweep and of some runs alone, and whether their answers are equal.

    Args:
        specs: the runs of the sweep.
        alone: the runs that are also computed alone, among them the dense run.
        folder: folder for records.
        batch_size: number of questions in a batch.
    """
    seconds: dict[str, tuple[float, float]] = {}
    answers: dict[str, bytes] = {}
    session = Session(Settings(folder / "unused", find_device(None), batch_size))
    session.model(specs[0])
    for spec in alone:
        runs = folder / f"alone-{len(seconds)}"
        cpu, wall, (record,) = timed(session, runs, [spec])
        seconds[spec.name] = cpu, wall
        answers[spec.name] = (runs / record.run_id / "answers.jsonl").read_bytes()
    cpu, wall, records = timed(session, folder / "sweep", specs)
    table = Table(title="CPU seconds (and seconds on the wall)", title_justify="left")
    for column in ("run", "alone", "share of the sweep", "computed", "same bytes"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for spec, record in zip(specs, records, strict=True):
        mine = seconds.get(spec.name)
        bytes_now = (folder / "sweep" / record.run_id / "answers.jsonl").read_bytes()
        same = "" if mine is None else "yes" if bytes_now == answers[spec.name] else "NO"
        timing = record.timing
        share = timing.seconds * cpu / wall
        counted = f"{timing.computed} of {timing.questions}"
        table.add_row(spec.name, f"{mine[0]:.1f} ({mine[1]:.1f})" if mine else "", f"{share:.1f}", counted, same)
    table.add_row("all, shared", "", f"{cpu:.1f} ({wall:.1f})", "", "", style="bold")
    out.print(table)
    out.print(f"sweep / dense run alone: {cpu / seconds[DENSE][0]:.2f} (wall {wall / seconds[DENSE][1]:.2f})")
    if len(alone) == len(specs):
        total = sum(one for one, _ in seconds.values())
        out.print(f"sweep / sum of the runs alone: {cpu / total:.2f} ({total:.0f} s alone)")
    stages: dict[str, float] = defaultdict(float)
    for record in records:
        for stage, spent in record.timing.stages.items():
            stages[stage] += spent
    profile = ", ".join(f"{stage} {100 * spent / wall:.0f} %" for stage, spent in sorted(stages.items(), key=_by_size))
    out.print(
        f"of the sweep's time: {profile}, the rest (scoring, records) {100 * (1 - sum(stages.values()) / wall):.0f} %"
    )


def _attention(query: Any, key: Any, value: Any, *_args: Any, **_more: Any) -> int:
    """FLOPs of attention for shapes [B, heads, L, d], counted as if every token attended to all others."""
    return sdpa_flop_count(query, key, value)


def _by_size(item: tuple[str, float]) -> float:
    return -item[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="diagramqa")
    parser.add_argument("--data", help="a parquet file; the task's own by default")
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--alone", choices=("dense", "all"), default="dense")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--count", action="store_true", help="count multiply-adds instead of measuring times")
    parser.add_argument("--model", type=Path, help="checkpoint folder; the model is written there if there is none")
    given = parser.parse_args()
    task = load_task(TaskSpec(name=given.task, data=given.data))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = given.model or folder / "model"
        if not (checkpoint / "config.json").exists():
            count = random_llava.save(checkpoint, (doc["text"] for doc in task.docs))
            out.print(f"{count / 1e6:.0f} million parameters")
        data = f", data: {Path(given.data).resolve()}" if given.data else ""
        changes = [f"model={checkpoint.resolve()}", f"task={{name: {given.task}, limit: {given.limit}{data}}}"]
        specs = load_spec("table2_w4a4", changes)
        (dense,) = (spec for spec in specs if spec.name == DENSE)
        docs = [task.docs[index] for index in range(min(given.limit, task.count))]
        shown = sum(doc.get("image") is not None for doc in docs)
        out.print(f"{given.task}: {len(docs)} questions, {shown} with an image")
        if given.count:
            count_products(specs, dense, folder, given.batch_size)
        else:
            measure(specs, specs if given.alone == "all" else [dense], folder, given.batch_size)


if __name__ == "__main__":
    main()
