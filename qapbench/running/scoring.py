"""Makes a record from stored answers: their task scores them, and right answers are counted here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from qapbench.records.intact import digests
from qapbench.records.parts import Environment, ScoreTable, Stopped, TaskRecord, Timing, TokenCounts, Unanswered
from qapbench.records.record import SCORED, Record
from qapbench.records.store import write_lines
from qapbench.records.tally import tally
from qapbench.tasking.questions import Question
from qapbench.tasking.scores import score
from qapbench.tasking.tasks import LoadedTask

from .active_run import ActiveRun, place_among
from .costs import run_cost
from .environment import environment
from .notes import chance, labels, notes, receipt_record


def finish(
    active: ActiveRun,
    task: LoadedTask,
    questions: Sequence[Question],
    refused: Sequence[Question],
    processor: Any,
    machine: Mapping[str, Any],
    devices: Sequence[torch.device],
    stopped: Stopped | None,
    peak: Mapping[str, int],
) -> Record:
    """Put a run's answers in order, score them, and make the record.

    Args:
        active: the run.
        task: the run's task.
        questions: the questions that it had to answer, in the order of the work.
        refused: those that it could not be asked, because the model's processor refuses their pictures.
        processor: the model's processor.
        machine: entries of the record's environment besides versions and device.
        devices: the device that holds the model, or those that share it.
        stopped: why the run answered only a part of the questions; None if it answered all.
        peak: peak memory of the processes that answered, in MB, and of their phases, as `Phases.peaks` has it.
    """
    planned, spec = active.planned, active.spec
    answers = active.store.arrange(place_among(questions), [question.place for question in questions])
    docs = sorted(answer.doc for answer in answers) if stopped or refused else None
    scored = score(answers, task, processor, spec.seed, docs)
    receipt = active.read_receipt(answers)
    write_lines(planned.folder / SCORED, scored.questions)
    seconds = sum(active.seconds.values())
    metrics = [question.metrics for question in scored.questions]
    scores = tally(metrics, scored.columns, task.unavailable, scored.figures).to_json()
    scores["confidence"] = scored.confidence
    for column in scores["columns"]:
        column |= {"lower": True} if column["name"] in task.lower else {}
    unanswered = sorted(
        (Unanswered(id=q.id, doc=q.place[1], why=q.refused or "") for q in refused), key=lambda one: one.doc
    )
    said = notes(spec, task, receipt, unanswered)
    return Record(
        run_id=planned.id,
        text_key=planned.text_key,
        name=spec.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        spec=spec.model_dump(mode="json"),
        labels=labels(spec),
        task=TaskRecord(name=task.name, questions=len(answers), chance=chance(task), score=task.score),
        scores=ScoreTable.model_validate(scores),
        tokens=TokenCounts.model_validate(receipt.tokens) if receipt.tokens else None,
        receipt=receipt_record(receipt),
        environment=Environment.model_validate({**environment(*devices), **machine}),
        fingerprints=planned.fingerprints,
        files=digests(planned.folder),
        timing=Timing(
            seconds=round(seconds, 3),
            questions=active.answered,
            computed=active.computed,
            questions_per_second=round(active.answered / seconds, 2) if seconds else 0.0,
            stages={name: round(spent, 3) for name, spent in active.seconds.items()},
            **{name: value for name, value in peak.items() if " of " not in name},
            memory_mb=_of_phases(peak, "memory of "),
            gpu_memory_mb=_of_phases(peak, "gpu memory of "),
        ),
        notes=[stopped.bound, *said] if stopped else said,
        stopped=stopped,
        unanswered=unanswered,
        cost=run_cost(spec, receipt, str(machine["dtype"])),
    )


def _of_phases(peak: Mapping[str, int], kind: str) -> dict[str, int]:
    """The peaks of phases: phase -> MB."""
    return {name.removeprefix(kind): value for name, value in peak.items() if name.startswith(kind)}
