"""Scores stored answers with lm-eval's evaluator: the task's own filters, metrics and aggregation functions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from qapbench.records.answer import Answer, ScoredQuestion
from qapbench.records.parts import Confidence
from qapbench.records.tally import UNPARSED

from .lm import AskingLM
from .tasks import LoadedTask, quiet

INVALID = "[invalid]"
"""What lm-eval's filters make of a text in which they find no answer."""
BINS = 15  # of confidence, for the expected calibration error


@dataclass(frozen=True)
class TaskScores:
    """What a task makes of the answers of one run.

    Attributes:
        questions: the scores of each question, in the order of the documents.
        columns: names of the columns, in the order of the table.
        figures: column -> the task's own figure over all questions, of columns that are not the mean of what is per
            question.
        confidence: how reliable the probabilities of the options are; None where there are none.
    """

    questions: list[ScoredQuestion]
    columns: list[str]
    figures: dict[str, float] = field(default_factory=dict)
    confidence: Confidence | None = None


def score(
    answers: Sequence[Answer], task: LoadedTask, processor: Any, seed: int, docs: list[int] | None = None
) -> TaskScores:
    """Score stored answers with lm-eval's evaluator, that is, with the task's filters, metrics and aggregations.

    A task with several filters has a column for every metric after each of them. Those of its first filter have the
    metric's name, the others the filter's name too.

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
        with quiet(), _samples_as_they_are():
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
    (totals,) = results["results"].values()
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    columns = {(name, used): name for used in filters[:1] for name in task.columns}
    columns |= {(name, used): f"{name} ({used})" for used in filters[1:] for name in task.columns}
    metrics: dict[int, dict[str, Any]] = {}
    for sample in samples:
        used, of_doc = sample["filter"], metrics.setdefault(sample["doc_id"], {})
        of_doc |= {columns[name, used]: _plain(sample[name]) for name in task.columns if name in sample}
        if used == filters[0] and (UNPARSED in sample or INVALID in sample["filtered_resps"]):
            of_doc[UNPARSED] = _plain(sample.get(UNPARSED, 1.0))
    own = [(place, column) for place, column in columns.items() if place[0] not in task.means]
    figures = {column: totals.get(",".join(place)) for place, column in own}
    return TaskScores(
        [ScoredQuestion(id=task.ids[doc], doc=doc, metrics=found) for doc, found in sorted(metrics.items())],
        list(columns.values()),
        {column: float(figure) for column, figure in figures.items() if _is_finite(figure)},
        confidence_in(answers, task),
    )


@contextlib.contextmanager
def _samples_as_they_are() -> Iterator[None]:
    """While the context is open, lm-eval makes no copy of all samples in which their pictures are hashed."""
    from lm_eval import evaluator

    held = evaluator.LMEVAL_HASHMM
    evaluator.LMEVAL_HASHMM = False
    try:
        yield
    finally:
        evaluator.LMEVAL_HASHMM = held


def confidence_in(answers: Sequence[Answer], task: LoadedTask) -> Confidence | None:
    """How reliable the probabilities of the options are; None if the task does not compare options.

    Args:
        answers: the answers of one run.
        task: the run's task.
    """
    if not task.letter:
        return None
    pairs = [(answer, _right_option(task, answer)) for answer in answers]
    known = [(_shares([output[0] for output in answer.outputs]), right) for answer, right in pairs if right is not None]
    return confidence(known) if known else None


def confidence(questions: Sequence[tuple[Sequence[float], int]]) -> Confidence:
    """Expected calibration error and Brier's score.

    Args:
        questions: for each question the probabilities of its options, and the index of the right one.
    """
    brier = [sum((p - (at == right)) ** 2 for at, p in enumerate(shares)) for shares, right in questions]
    bins: dict[int, list[float]] = {}
    for shares, right in questions:
        best = max(shares)
        bins.setdefault(min(int(best * BINS), BINS - 1), []).append((shares.index(best) == right) - best)
    n = len(questions)
    return Confidence(ece=sum(abs(math.fsum(gaps)) for gaps in bins.values()) / n, brier=math.fsum(brier) / n, n=n)


def _right_option(task: LoadedTask, answer: Answer) -> int | None:
    """Index of the right option of a question; None if there is not exactly one, or options are no continuations."""
    if getattr(task.task, "multiple_input", 0):
        return None
    doc = task.docs[answer.doc]
    options, target = task.task.doc_to_choice(doc), task.task.doc_to_target(doc)
    if isinstance(target, str):
        target = options.index(target) if target in options else None
    whole = isinstance(target, int) and 0 <= target < len(options) == len(answer.outputs)
    return int(target) if whole else None


def _shares(likelihoods: Sequence[float]) -> list[float]:
    """The softmax of log-likelihoods."""
    best = max(likelihoods)
    powers = [math.exp(one - best) for one in likelihoods]
    return [power / math.fsum(powers) for power in powers]


def _is_finite(figure: Any) -> bool:
    """Whether an aggregation gave a number. Those of lm-eval are Python's, NumPy's, or a text where there is none."""
    return hasattr(figure, "__float__") and math.isfinite(figure)


def _plain(value: Any) -> Any:
    """A question's score as JSON can hold it: some metrics of lm-eval's give a tuple or an array per question."""
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value.tolist() if hasattr(value, "tolist") else value
