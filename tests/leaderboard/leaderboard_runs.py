"""Folders of runs made without a model: questions in a file, and for each run answers, scores and a record."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from leaderboard_records import IMG, NOTE, SCRIPT_END
from PIL import Image

from qapbench.receipt import ImageTokens, Receipt
from qapbench.records.answer import Answer, ScoredQuestion
from qapbench.records.record import Record, parse_record
from qapbench.records.store import answers_of, write_json, write_lines
from qapbench.records.tally import tally
from qapbench.running.notes import labels
from qapbench.running.several import joined
from qapbench.spec.run_spec import RunSpec
from qapbench.spec.task_spec import TaskSpec
from qapbench.tasking.tasks import LoadedTask, load_task

QUESTIONS, TOKENS, KEEP = 40, 16, 5
W4A4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 16}, "activations": {"bits": 4, "group_size": 16}}
FIRST = ("full", "dense", "semantic", "combined", "l2")


def write_questions(path: Path, hostile: bool = False) -> Path:
    """Half with an image; subjects and grades known throughout."""
    rows = []
    for index in range(QUESTIONS):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(index).integers(0, 255, (32, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        rows.append(
            {
                "pid": f"q{index}{IMG if hostile else ''}",
                "image": {"bytes": buffer.getvalue(), "path": None} if index % 2 == 0 else None,
                "question": SCRIPT_END if hostile else f"What is number {index}?",
                "choices": [IMG, SCRIPT_END] if hostile else ["cat", "dog"],
                "answer": index % 2 if index % 4 < 2 else (index + 1) % 2,
                "hint": "a context" if index % 3 else "",
                "subject": ["natural science", "social science", "language science"][index % 3],
                "grade": f"grade{1 + index % 12}",
            }
        )
    pd.DataFrame(rows).to_parquet(path)
    return path


def write_runs(folder: Path, data: Path, names: Sequence[str] = FIRST, moved: bool = False) -> list[Record]:
    """A run for each name; `moved`: the answers to questions without images move with the pruning."""
    task = load_task(TaskSpec(name="scienceqa", data=str(data)))
    return [_write(folder, task, str(data), name, moved) for name in names]


def write_several(folder: Path, names: Sequence[str] = FIRST) -> list[Record]:
    """A run of two tasks for each name, which are two files of questions."""
    tasks = [write_questions(folder.with_name(f"{folder.name} {part}.parquet"), part == "b") for part in "ab"]
    columns = [write_runs(folder, data, names) for data in tasks]
    made = []
    for name, records in zip(names, zip(*columns, strict=True), strict=True):
        parts = [spec_of(str(data), name) for data in tasks]
        spec = parts[0].model_copy(update={"tasks": [part.task for part in parts]})
        made.append(joined(spec, parts, records))
        place = folder / made[-1].run_id
        place.mkdir()
        write_json(place / "record.json", made[-1].to_json())
    return made


def spec_of(data: str, name: str) -> RunSpec:
    """`full`, `dense`, `semantic` or a metric; `l2@3@0.5` is a metric at a budget and a weight of the fusion."""
    prune: dict[str, Any] | None = None
    if name not in ("full", "dense"):
        metric, *more = name.split("@")
        prune = {"method": "cdpruner", "keep": int(more[0]) if more else KEEP}
        if metric != "semantic":
            prune |= {"sensitivity": metric}
        if more[1:]:
            prune |= {"fusion": {"convex": {"semantic": float(more[1])}}}
    quantize = None if name == "full" else W4A4
    task = {"name": "scienceqa", "data": data}
    return RunSpec.parse({"name": name, "model": "tiny", "task": task, "quantize": quantize, "prune": prune})


def _write(folder: Path, task: LoadedTask, data: str, name: str, moved: bool) -> Record:
    spec = spec_of(data, name)
    content = {"model": "m" * 64, "data": task.fingerprint, "precision": "float32 on cpu"}
    run_id = spec.digest(content, task.asked)
    answers: list[Answer] = []
    scored: list[ScoredQuestion] = []
    for doc, question in enumerate(task.ids):
        row = task.docs[doc]
        own = name if row["image"] is not None or moved else str(bool(spec.quantize))
        draw = random.Random(f"{own} {doc}")
        right = draw.random() < 0.7
        best = row["answer"] if right else 1 - row["answer"]
        outputs = [[-0.1 if choice == best else -2.0, choice == best] for choice in range(2)]
        images = None
        if row["image"] is not None:
            kept = sorted(draw.sample(range(TOKENS), spec.prune.keep)) if spec.prune else None
            images = [ImageTokens(available=TOKENS, kept=kept)]
        answers.append(
            Answer(task="scienceqa", doc=doc, id=question, answer="AB"[best], outputs=outputs, images=images)
        )
        metrics = task.task.process_results(row, list(map(tuple, outputs)))
        scored.append(ScoredQuestion(id=question, doc=doc, metrics=metrics))
    receipt = Receipt()
    receipt.recount(image for answer in answers for image in answer.images or [])
    linear = {
        "name": "layers.0",
        "part": "language",
        "weight_bits": 4,
        "activation_bits": 4,
        "calls": 9,
        "planned": True,
    }
    record = parse_record(
        {
            "schema": 2,
            "run_id": run_id,
            "text_key": "t",
            "name": name,
            "created": f"2026-11-0{1 + len(name)}T19:00:00Z",
            "spec": spec.model_dump(mode="json"),
            "labels": labels(spec),
            "task": {"name": task.name, "questions": task.count},
            "scores": tally((line.metrics for line in scored), task.columns, task.unavailable).to_json(),
            "tokens": receipt.tokens,
            "receipt": {"summary": "rtn: W4A4", "linears": [linear] if spec.quantize else [], "fallbacks": []},
            "environment": {"torch": "2.13.0"},
            "fingerprints": content,
            "timing": {"seconds": 1.0},
            "notes": [NOTE],
        }
    )
    place = folder / run_id
    place.mkdir(parents=True)
    write_json(place / "record.json", record.to_json())
    answers_of(place).append(answers)
    write_lines(place / "scored.jsonl", scored)
    return record


def write_study(folder: Path, hostile: bool = False) -> dict[str, Any]:
    """A study's summary, as `qapbench study sensitivity` leaves it."""
    word = SCRIPT_END + IMG if hostile else "l2"
    correlation = {"rho": 0.25, "low": 0.1, "high": 0.4, "n": 12}
    none = {"rho": None, "low": None, "high": None, "n": 0}
    targets = ("answer", "error", "full")
    summary = {
        "schema_version": 1,
        "study": "sensitivity",
        "id": "a" * 16,
        "name": word if hostile else "tiny rtn W4A4",
        "created": "2026-11-22T19:00:00Z",
        "model": word,
        "task": word,
        "quantization": word,
        "spec": {},
        "questions": 12,
        "sample": 12,
        "units": 192,
        "block": 1,
        "changed": 0.1,
        "targets": dict.fromkeys(targets, word),
        "predictors": [
            {"name": word, "kind": "metric", "correlations": dict.fromkeys(targets, correlation)},
            {"name": "cdpruner", "kind": "relevance", "correlations": dict.fromkeys(targets, none)},
        ],
        "fingerprints": {},
        "environment": {},
        "timing": {"seconds": 1.0},
        "notes": [NOTE],
    }
    place = folder / f"study-{summary['id']}"
    place.mkdir(parents=True)
    (place / "study.json").write_text(json.dumps(summary))
    return summary
