"""Makes a record from stored answers: lm-eval scores them, and right answers are counted here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from qapbench.receipt import Receipt
from qapbench.records.answer import Answer, ScoredQuestion
from qapbench.records.intact import digests
from qapbench.records.record import (
    SCORED,
    Environment,
    ReceiptRecord,
    Record,
    ScoreTable,
    Stopped,
    TaskRecord,
    Timing,
    TokenCounts,
)
from qapbench.records.store import write_lines
from qapbench.records.tally import tally
from qapbench.tasking.lm import AskingLM
from qapbench.tasking.questions import Question
from qapbench.tasking.tasks import LoadedTask, quiet

from .active_run import ActiveRun, place_among
from .environment import environment
from .notes import chance, labels, notes


def finish(
    active: ActiveRun,
    task: LoadedTask,
    questions: Sequence[Question],
    processor: Any,
    machine: Mapping[str, Any],
    device: torch.device,
    stopped: Stopped | None,
    peak: Mapping[str, int],
) -> Record:
    """Put a run's answers in order, score them, and make the record.

    Args:
        active: the run.
        task: the run's task.
        questions: the questions that it had to answer, in the order of the work.
        processor: the model's processor.
        machine: entries of the record's environment besides versions and device.
        device: the device that holds the model.
        stopped: why the run answered only a part of the questions; None if it answered all.
        peak: peak memory of the processes that answered, in MB.
    """
    planned, spec = active.planned, active.spec
    answers = active.store.arrange(place_among(questions), [question.place for question in questions])
    docs = None if stopped is None else sorted(answer.doc for answer in answers)
    samples = score(answers, task, processor, spec.seed, docs)
    receipt = active.read_receipt(answers)
    write_lines(planned.folder / SCORED, samples)
    seconds = sum(active.seconds.values())
    scores = tally((sample.metrics for sample in samples), task.columns, task.unavailable)
    said = notes(spec, task, receipt)
    return Record(
        run_id=planned.id,
        text_key=planned.text_key,
        name=spec.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        spec=spec.model_dump(mode="json"),
        labels=labels(spec),
        task=TaskRecord(name=task.name, questions=len(answers), chance=chance(task)),
        scores=ScoreTable.model_validate(scores.to_json()),
        tokens=TokenCounts.model_validate(receipt.tokens) if receipt.tokens else None,
        receipt=receipt_record(receipt),
        environment=Environment.model_validate({**environment(device), **machine}),
        fingerprints=planned.fingerprints,
        files=digests(planned.folder),
        timing=Timing(
            seconds=round(seconds, 3),
            questions=active.answered,
            computed=active.computed,
            questions_per_second=round(active.answered / seconds, 2) if seconds else 0.0,
            stages={name: round(spent, 3) for name, spent in active.seconds.items()},
            **peak,
        ),
        notes=[stopped.bound, *said] if stopped else said,
        stopped=stopped,
    )


def receipt_record(receipt: Receipt) -> ReceiptRecord:
    """The receipt in the form in which a record holds it."""
    return ReceiptRecord.model_validate(receipt.to_json())


def score(
    answers: Sequence[Answer], task: LoadedTask, processor: Any, seed: int, docs: list[int] | None = None
) -> list[ScoredQuestion]:
    """Score stored answers with lm-eval's evaluator, that is, with the task's `process_results`.

    Args:
        answers: the answers of one run.
        task: the run's task.
        processor: the model's processor, whose chat template writes the prompts.
        seed: of few-shot examples.
        docs: the documents that were asked, ascending; None if all were.

    Raises:
        UserError: a function or a metric of the task fails. The answers stay stored.
    """
    from lm_eval.evaluator import evaluate

    lm = AskingLM(processor, answers=answers, docs=docs)
    task.task.set_fewshot_seed(seed=seed)
    try:
        with quiet():
            # `simple_evaluate` would also describe the machine, which takes seconds and is not used here.
            results = evaluate(
                lm,
                {"tasks": {task.name: task.task}, "groups": {}, "group_map": {}},
                limit=None if docs else task.count,
                samples={task.name: docs} if docs else None,
                bootstrap_iters=0,
                apply_chat_template=lm.templated,
            )
    except Exception as error:  # the functions and metrics that a task's YAML names have no common base
        raise task.failure("scoring fails (answers are kept)", error) from error.__cause__
    (samples,) = results["samples"].values()
    names = [*task.columns, "unparsed"]
    first = {
        sample["doc_id"]: sample for sample in reversed(samples)
    }  # a task with several filters has several samples per document: the first counts
    return [
        ScoredQuestion(
            id=task.ids[doc], doc=doc, metrics={name: _plain(sample[name]) for name in names if name in sample}
        )
        for doc, sample in sorted(first.items())
    ]


def _plain(value: Any) -> Any:
    """A question's score as JSON can hold it: some metrics of lm-eval's give a tuple or an array per question."""
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value.tolist() if hasattr(value, "tolist") else value
