"""The relative average of a run: its score in percent of the full-precision model's, averaged over tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qapbench.records.parts import ColumnScore, TaskPart
from qapbench.records.record import Record


@dataclass(frozen=True)
class Relative:
    """What a run keeps of the full-precision model that prunes nothing, as papers on pruning report it.

    Attributes:
        average: mean over the run's tasks of its score in that model's, as a fraction; None if it is not known.
        by_task: label of a task -> that fraction.
        reason: why there is no average.
    """

    average: float | None = None
    by_task: Mapping[str, float] | None = None
    reason: str = ""


def relative_averages(records: Sequence[Record]) -> list[Relative]:
    """The relative average of each record, against the full-precision runs among the records.

    A reference has the same model, the same questions asked in the same way and nothing compressed. If there are
    several, one of the same precision counts, and of these the newest. Where a lower value is better, the fraction is
    turned over.
    """
    dense: dict[tuple[str, str], ColumnScore] = {}
    for record in sorted(records, key=lambda record: record.created):
        if not record.spec.get("quantize") and not record.spec.get("prune"):
            for part in parts_of(record):
                for key in _keys(record, part):
                    if (score := score_of(part)) is not None:
                        dense[key] = score
    return [_relative(record, dense) for record in records]


def parts_of(record: Record) -> list[TaskPart]:
    """The results of a run by task, also of a run that asked a single one."""
    if record.parts:
        return record.parts
    if record.task is None:
        return []
    data = record.fingerprints.get("data", "")
    return [
        TaskPart(
            label=record.task.name,
            run_id=record.run_id,
            task=record.task,
            data=data,
            scores=record.scores,
            tokens=record.tokens,
            stopped=record.stopped,
        )
    ]


def score_of(part: TaskPart) -> ColumnScore | None:
    """The column of a task's score; None if there are no columns."""
    named = part.scores.column(part.task.score) if part.task.score else None
    return named or next(reversed(part.scores.columns), None)


def _relative(record: Record, dense: Mapping[tuple[str, str], ColumnScore]) -> Relative:
    shares: dict[str, float] = {}
    parts = parts_of(record)
    for part in parts:
        own = score_of(part)
        reference = next((dense[key] for key in reversed(_keys(record, part)) if key in dense), None)
        if own is None or reference is None or own.name != reference.name:
            return Relative(reason=f"no full-precision run of this model on {part.label} to compare with")
        pair = (reference.value, own.value) if own.lower else (own.value, reference.value)
        if pair[0] is None or not pair[1] or part.stopped:
            return Relative(reason=f"no share can be had of the score on {part.label}")
        shares[part.label] = pair[0] / pair[1]
    if not shares:
        return Relative(reason="the record does not say what was asked")
    return Relative(sum(shares.values()) / len(shares), shares)


def _keys(record: Record, part: TaskPart) -> list[tuple[str, str]]:
    """What a run and its reference have in common on one task: with any precision, and with the same."""
    asked = _asked(record, part)
    content = [record.fingerprints.get("model"), part.data, part.task.questions, part.scores.unparsed.n]
    alike = json.dumps([content, asked, record.spec.get("seed")], sort_keys=True, default=str)
    return [(alike, ""), (alike, record.fingerprints.get("precision", ""))]


def _asked(record: Record, part: TaskPart) -> list[Any]:
    """How the task was asked: the options of its spec that change the prompt or the way of answering."""
    listed = record.spec.get("task")
    specs = listed if isinstance(listed, list) else [listed]
    place = [one.run_id for one in parts_of(record)].index(part.run_id)
    named = specs[place] if place < len(specs) else None
    spec = named if isinstance(named, dict) else {}
    return [spec.get(name) for name in ("answers", "prompt", "parser")]
