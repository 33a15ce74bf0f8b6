"""Makes the record of a run that asked several tasks, from the records of its runs of one task each."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qapbench.hashing import digest_json
from qapbench.receipt import Receipt, ReceiptFields
from qapbench.records.parts import (
    ColumnScore,
    CostRecord,
    ScoreTable,
    Stopped,
    TaskPart,
    TaskRecord,
    Timing,
    TokenCounts,
    Unparsed,
)
from qapbench.records.record import Record
from qapbench.spec.run_spec import RunSpec

from .notes import receipt_record


def joined(spec: RunSpec, parts: Sequence[RunSpec], records: Sequence[Record]) -> Record:
    """The record of a run that asked several tasks. Whatever order and place its parts were made in, it is the same.

    Args:
        spec: the run.
        parts: its runs of one task each.
        records: their records.
    """
    first = records[0]
    labels = _labels(records)
    receipt = _receipt(records)
    table = ScoreTable(
        columns=[_column(label, record) for label, record in zip(labels, records, strict=True)],
        unparsed=_unparsed(records),
    )
    questions = sum(record.task.questions for record in records if record.task)
    return Record(
        run_id=joined_id([record.run_id for record in records]),
        text_key=digest_json([record.text_key for record in records]),
        name=spec.name,
        created=max(record.created for record in records),
        spec={**spec.model_dump(mode="json"), "task": [part.task.model_dump(mode="json") for part in parts]},
        labels=first.labels,
        task=TaskRecord(name=", ".join(labels), questions=questions),
        scores=table,
        tokens=TokenCounts.model_validate(receipt.tokens) if receipt.tokens else None,
        receipt=receipt_record(receipt),
        environment=first.environment,
        fingerprints=_together({label: record.fingerprints for label, record in zip(labels, records, strict=True)}),
        timing=_timing(records),
        notes=_notes(spec, records),
        stopped=_stopped(records, questions),
        unanswered=[one for record in records for one in record.unanswered],
        cost=_cost(records),
        parts=[
            TaskPart(
                label=label,
                run_id=record.run_id,
                task=record.task or TaskRecord(name=label, questions=record.scores.unparsed.n),
                data=record.fingerprints.get("data", ""),
                scores=record.scores,
                tokens=record.tokens,
                stopped=record.stopped,
            )
            for label, record in zip(labels, records, strict=True)
        ],
    )


def joined_id(ids: Sequence[str]) -> str:
    """Id of a run that asked several tasks, from the ids of its runs of one task each."""
    return digest_json(["several tasks", *ids])


def _labels(records: Sequence[Record]) -> list[str]:
    """A label for each task: its name, with a number from the second task of that name on."""
    seen: dict[str, int] = {}
    found = []
    for record in records:
        name = record.task.name if record.task else "task"
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def _column(label: str, record: Record) -> ColumnScore:
    """The task's score as a column of the run's own table."""
    return record.score.model_copy(update={"name": label}) if record.score else ColumnScore(name=label)


def _unparsed(records: Sequence[Record]) -> Unparsed:
    k, n = (sum(getattr(record.scores.unparsed, part) for record in records) for part in "kn")
    return Unparsed(k=k, n=n, rate=k / n if n else 0.0)


def _receipt(records: Sequence[Record]) -> Receipt:
    """The receipt of all parts: what is counted per image is added up, the rest is that of the first part."""
    receipts = [record.receipt for record in records]
    summed = ("images", "available", "kept", "merged", "separators", "transparent", "too_long")
    totals: dict[str, Any] = {name: sum(getattr(one, name) for one in receipts) for name in summed}
    totals["layers"] = [sum(layer) for layer in itertools.zip_longest(*(one.layers for one in receipts), fillvalue=0)]
    for name, extreme in (("least", min), ("most", max)):
        totals[name] = extreme((v for one in receipts if (v := getattr(one, name)) is not None), default=None)
    totals["fallbacks"] = list(dict.fromkeys(what for one in receipts for what in one.fallbacks))
    return Receipt.model_validate({**receipts[0].model_dump(include=set(ReceiptFields.model_fields)), **totals})


def _cost(records: Sequence[Record]) -> CostRecord | None:
    """The cost of all parts: the mean over images. What does not depend on the images is that of the first part."""
    costs = [record.cost for record in records if record.cost is not None]
    if len(costs) < len(records):
        return None
    images = [(record.tokens.images or 1) if record.tokens else 0 for record in records]
    if not any(images):
        return costs[0]

    def mean(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: mean([value[key] for value in values]) for key in values[0]}
        return sum(n * value for n, value in zip(images, values, strict=True)) / sum(images)

    measured = {name for name in CostRecord.model_fields if name not in ("text", "image", "weight_bytes", "budget")}
    return CostRecord.model_validate(
        costs[next(at for at, n in enumerate(images) if n)].model_dump()
        | {name: mean([cost.model_dump()[name] for cost in costs]) for name in measured}
    )


def _together(content: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Fingerprints of all parts. One that differs between parts has the label of its task behind its name."""
    names = dict.fromkeys(name for one in content.values() for name in one)
    found: dict[str, str] = {}
    for name in names:
        values = {label: one[name] for label, one in content.items() if name in one}
        if len(set(values.values())) == 1:
            found[name] = next(iter(values.values()))
        else:
            found |= {f"{name} of {label}": value for label, value in values.items()}
    return found


def _timing(records: Sequence[Record]) -> Timing:
    timings = [record.timing for record in records]
    seconds = sum(one.seconds for one in timings)
    questions = sum(one.questions for one in timings)
    stages: dict[str, float] = {}
    for one in timings:
        for stage, spent in one.stages.items():
            stages[stage] = round(stages.get(stage, 0.0) + spent, 3)
    peaks = {
        name: max((v for one in timings if (v := getattr(one, name)) is not None), default=None)
        for name in ("peak_memory_mb", "peak_gpu_memory_mb")
    }
    return Timing(
        seconds=round(seconds, 3),
        questions=questions,
        computed=sum(one.computed for one in timings),
        questions_per_second=round(questions / seconds, 2) if seconds else 0.0,
        stages=stages,
        memory_mb=_most(one.memory_mb for one in timings),
        gpu_memory_mb=_most(one.gpu_memory_mb for one in timings),
        **peaks,
    )


def _most(peaks: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The largest peak of each phase."""
    found: dict[str, int] = {}
    for one in peaks:
        found |= {name: max(value, found.get(name, 0)) for name, value in one.items()}
    return found


def _notes(spec: RunSpec, records: Sequence[Record]) -> list[str]:
    notes = list(dict.fromkeys(note for record in records for note in record.notes))
    sources = {record.fingerprints.get("calibration") for record in records}
    if spec.quantize and spec.quantize.calibration and len(sources) > 1:
        notes.append("Calibrated for each task on that task's own questions, as runs of one task are.")
    return notes


def _stopped(records: Sequence[Record], questions: int) -> Stopped | None:
    """The reason for which the first of the stopped parts was stopped, with the counts of all parts."""
    why = next((record.stopped for record in records if record.stopped), None)
    if why is None:
        return None
    total = sum(one.stopped.of if one.stopped else one.task.questions if one.task else 0 for one in records)
    return why.model_copy(update={"asked": questions, "of": total})
