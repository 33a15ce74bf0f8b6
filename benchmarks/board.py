"""Seconds and memory that the leaderboard takes to build from a folder of many runs.

    python -m benchmarks.board [--runs 500] [--questions 300] [--keep FOLDER]

The runs are made up, on questions of diagramqa, and as large as real ones: their receipts list the 224 linears of a 7B
model, and most answers hold the kept tokens of an image of 576. They are written to a temporary folder, or to the one
that `--keep` names, where a second call finds them again. The build itself runs in a process of its own, whose peak
resident memory is reported together with what the imports alone take.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qapbench import metrics

TOKENS = 576
LAYERS = 32
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
W4A4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 128}, "activations": {"bits": 4, "group_size": 128}}


def specs(count: int, questions: int) -> list[dict[str, Any]]:
    """Specs of different runs: full precision, dense, meaning alone, and metrics by budget and weight of the fusion."""
    task = {"name": "diagramqa", "limit": questions}
    made: list[dict[str, Any]] = [{"name": "full precision"}, {"name": "dense", "quantize": W4A4}]
    pruners = ("cdpruner", "visionzip", "trim", "divprune", "hiprune", "vispruner")
    for keep, method in itertools.product((16, 32, 64, 128), pruners):
        made.append({"name": f"{method} {keep}", "quantize": W4A4, "prune": {"method": method, "keep": keep}})
    for weight, keep, method, metric in itertools.product((0.7, 0.5, 0.9), (16, 32, 64, 128), pruners, metrics.names()):
        prune = {"method": method, "keep": keep, "sensitivity": metric, "fusion": {"convex": {"semantic": weight}}}
        made.append({"name": f"{method} {keep} {metric} {weight}", "quantize": W4A4, "prune": prune})
    seeded = ({**spec, "seed": seed} for seed in itertools.count() for spec in made)
    return [{"model": "diagram-llava", "task": task, **spec} for spec in itertools.islice(seeded, count)]


def write_runs(folder: Path, count: int, questions: int) -> None:
    """Write that many finished runs below a folder."""
    from qapbench.receipt import ImageTokens, Receipt
    from qapbench.records.answer import Answer, ScoredQuestion
    from qapbench.records.intact import RECEIPT, StoredReceipt, digests
    from qapbench.records.record import SCHEMA, SCORED, parse_record, write_record
    from qapbench.records.store import answers_of, write_json, write_lines
    from qapbench.records.tally import tally
    from qapbench.running.notes import labels
    from qapbench.spec.run_spec import RunSpec
    from qapbench.spec.task_spec import TaskSpec
    from qapbench.tasking.tasks import load_task

    task = load_task(TaskSpec(name="diagramqa", limit=questions))
    asked = [(doc, task.ids[doc], task.docs[doc]) for doc in range(task.count)]
    for index, data in enumerate(specs(count, questions)):
        spec = RunSpec.parse(data)
        content = {"model": "m" * 64, "data": task.fingerprint, "precision": "float32 on cpu"}
        run_id = spec.digest(content, task.asked)
        answers: list[Answer] = []
        scored: list[ScoredQuestion] = []
        for doc, question, row in asked:
            draw = random.Random(f"{index if row['image'] is not None else bool(spec.quantize)} {doc}")
            truth = row["letters"].index(row["letter"])
            best = truth if draw.random() < 0.8 else draw.randrange(len(row["letters"]))
            outputs = [[-draw.random() - 2 * (place != best), place == best] for place in range(len(row["letters"]))]
            images = None
            if row["image"] is not None:
                kept = sorted(draw.sample(range(TOKENS), int(spec.prune.keep))) if spec.prune else None
                images = [ImageTokens(available=TOKENS, kept=kept)]
            key = f"{draw.getrandbits(256):064x}"
            letter = row["letters"][best]
            answer = Answer(
                task="diagramqa", doc=doc, id=question, answer=letter, outputs=outputs, key=key, images=images
            )
            answers.append(answer)
            right = task.task.process_results(row, list(map(tuple, outputs)))
            scored.append(ScoredQuestion(id=question, doc=doc, metrics=right))
        receipt = Receipt()
        receipt.recount(image for answer in answers for image in answer.images or [])
        place = folder / run_id
        place.mkdir(parents=True)
        answers_of(place).append(answers)
        write_lines(place / SCORED, scored)
        write_json(place / RECEIPT, StoredReceipt(group="g", receipt=receipt))
        record = parse_record(
            {
                "schema": SCHEMA,
                "run_id": run_id,
                "text_key": "t",
                "name": spec.name,
                "created": f"2026-11-01T{index // 3600:02}:{index // 60 % 60:02}:{index % 60:02}Z",
                "spec": spec.model_dump(mode="json"),
                "labels": labels(spec),
                "scores": tally((line.metrics for line in scored), task.columns, task.unavailable).to_json(),
                "tokens": receipt.tokens,
                "receipt": {"summary": "rtn: W4A4", "linears": linears() if spec.quantize else [], "fallbacks": []},
                "environment": {"torch": "2.13.0"},
                "fingerprints": content,
                "files": digests(place),
                "timing": {"seconds": 1.0},
            }
        )
        write_record(place, record)


def linears() -> list[dict[str, Any]]:
    """The linears of a 7B model, as a receipt lists them."""
    names = [*(f"self_attn.{name}" for name in MODULES), *(f"mlp.{name}" for name in MLP)]
    return [
        {
            "name": f"model.language_model.layers.{layer}.{name}",
            "part": "language",
            "weight_bits": 4,
            "activation_bits": 4,
            "calls": 1,
            "planned": True,
        }
        for layer in range(LAYERS)
        for name in names
    ]


def measure(runs: Path, page: Path) -> dict[str, float]:
    """Build the page as `qapbench leaderboard` does. Returns seconds and MB."""
    from qapbench.leaderboard import build
    from qapbench.records.load import load_records

    imported = peak_mb()
    started, spent = time.perf_counter(), time.process_time()
    records = load_records(runs)
    read = time.perf_counter() - started
    build(records, page, runs=runs)
    seconds = time.perf_counter() - started
    return {
        "runs": len(records),
        "seconds": round(seconds, 2),
        "CPU seconds": round(time.process_time() - spent, 2),
        "seconds of them for the records": round(read, 2),
        "peak MB": round(peak_mb()),
        "MB after the imports": round(imported),
        "page MB": round(page.stat().st_size / 2**20, 2),
    }


def peak_mb() -> float:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--keep", type=Path, help="folder for the runs, to be used again")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.keep or Path(temporary)
        runs = folder / "runs"
        context = multiprocessing.get_context("spawn")
        if not runs.exists():
            with context.Pool(1) as pool:
                pool.apply(write_runs, (runs, asked.runs, asked.questions))
        with context.Pool(1) as pool:
            found = pool.apply(measure, (runs, folder / "board.html"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
