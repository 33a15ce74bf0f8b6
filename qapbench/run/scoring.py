"""From stored answers to a record: lm-eval scores, we count."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from qapbench.memory import peak_memory

from .cells import Cell
from .environment import environment
from .lm import AskingLM
from .questions import Question
from .record import SCHEMA, SCORED, Record, chance, labels, notes, write_scored
from .store import Answer
from .tasks import LoadedTask, quiet


def finish(
    cell: Cell, task: LoadedTask, questions: Sequence[Question], processor: Any, machine: dict[str, Any],
    device: torch.device, stopped: dict[str, Any] | None = None,
) -> Record:  # fmt: skip
    """Put a run's answers in order, score them, and give its record.

    Args:
        questions: those that it had to answer, in the order of the work.
        machine: what `record["environment"]` says beside versions and device.
        stopped: why it did not answer all, where it did not.
    """
    from qapbench.analysis.score import tally

    planned, spec = cell.planned, cell.spec
    answers = cell.store.arrange(lambda answer: (answer["task"], answer["doc"]), [q.place for q in questions])
    samples = score(answers, task, processor, spec.seed, None if stopped is None else _docs(answers))
    receipt = cell.read_receipt(answers)
    write_scored(planned.folder / SCORED, samples)
    seconds = sum(cell.seconds.values())
    scores = tally((sample["metrics"] for sample in samples), task.columns, task.unavailable)
    said = notes(spec, task, receipt)
    return {
        "schema": SCHEMA,
        "run_id": planned.id,
        "text_key": planned.text_key,
        "name": spec.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "spec": spec.model_dump(mode="json"),
        "labels": labels(spec),
        "task": {"name": task.name, "questions": len(answers), "chance": chance(task)},
        "scores": scores.to_json(),
        "tokens": receipt.tokens,
        "receipt": receipt.to_json(),
        "environment": {**environment(device), **machine},
        "fingerprints": planned.fingerprints,
        "timing": {
            "seconds": round(seconds, 3), "questions": cell.answered, "computed": cell.computed,
            "questions_per_second": round(cell.answered / seconds, 2) if seconds else 0.0,
            "stages": {name: round(spent, 3) for name, spent in cell.seconds.items()}, **peak_memory(device),
        },
        "notes": [stopped["bound"], *said] if stopped else said,
        **({"stopped": stopped} if stopped else {}),
    }  # fmt: skip


def score(
    answers: Sequence[Answer], task: LoadedTask, processor: Any, seed: int, docs: list[int] | None = None
) -> list[dict[str, Any]]:
    """lm-eval's own evaluator over stored answers; for each question its id and what `process_results` gave.

    Args:
        docs: the documents that were asked, ascending, where these are not all.
    """
    from lm_eval.evaluator import evaluate

    lm = AskingLM(processor, answers=answers, docs=docs)
    task.task.set_fewshot_seed(seed=seed)
    with quiet():
        # `simple_evaluate` would add its own report of the machine, which takes seconds and is not used.
        results = evaluate(
            lm, {"tasks": {task.name: task.task}, "groups": {}, "group_map": {}}, limit=None if docs else task.count,
            samples={task.name: docs} if docs else None, bootstrap_iters=0, apply_chat_template=lm.templated,
        )  # fmt: skip
    (samples,) = results["samples"].values()
    names = [*task.columns, "unparsed"]
    first = {sample["doc_id"]: sample for sample in reversed(samples)}  # of a task with several filters, the first
    return [
        {"id": task.ids[doc], "doc": doc, "metrics": {name: sample[name] for name in names if name in sample}}
        for doc, sample in sorted(first.items())
    ]


def _docs(answers: Sequence[Answer]) -> list[int]:
    return sorted(answer["doc"] for answer in answers)
