"""Counting right answers: per column, with Wilson intervals; and scoring outputs that are already stored."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qapbench.errors import Problem, UserError
from qapbench.run.tasks import UNPARSED, LoadedTask, load_task
from qapbench.spec import TaskSpec

LOG = logging.getLogger(__name__)
LEVEL = 0.95
"""Of every interval."""
SHOWN = 5
WHERE = ("file",)


@dataclass(frozen=True)
class Tally:
    """k right of n."""

    k: int
    n: int

    @property
    def accuracy(self) -> float:
        """As a fraction; NaN of nothing."""
        return self.k / self.n if self.n else math.nan

    @property
    def stderr(self) -> float:
        """Binomial standard error of the accuracy, sqrt(p (1 - p) / n)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n) if self.n else math.nan

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        if not self.n:
            return math.nan, math.nan
        from statsmodels.stats.proportion import proportion_confint

        low, high = proportion_confint(self.k, self.n, alpha=1 - LEVEL, method="wilson")
        # Rounding must not leave the accuracy of 0 or 1 outside.
        return min(float(low), self.accuracy), max(float(high), self.accuracy)

    @property
    def low(self) -> float:
        return self.interval[0]

    @property
    def high(self) -> float:
        return self.interval[1]

    def to_json(self) -> dict[str, Any]:
        return {
            "k": self.k,
            "n": self.n,
            "accuracy": self.accuracy,
            "stderr": self.stderr,
            "low": self.low,
            "high": self.high,
        }


@dataclass(frozen=True)
class Mean:
    """The mean of n values that are not counts of right answers; no Wilson interval exists for them."""

    mean: float
    n: int
    stderr: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        n = len(values)
        mean = math.fsum(values) / n
        spread = math.fsum((value - mean) ** 2 for value in values)
        return cls(mean, n, math.sqrt(spread / (n - 1) / n) if n > 1 else math.nan)

    def to_json(self) -> dict[str, Any]:
        # JSON has no NaN.
        return {"mean": self.mean, "n": self.n, "stderr": None if math.isnan(self.stderr) else self.stderr}


@dataclass(frozen=True)
class Column:
    """One column of a table: its value, or why there is none."""

    name: str
    value: Tally | Mean | None = None
    unavailable: str = ""

    def to_json(self) -> dict[str, Any]:
        rest = {"unavailable": self.unavailable} if self.value is None else self.value.to_json()
        return {"name": self.name, **rest}


@dataclass(frozen=True)
class Scores:
    """The columns in the task's order.

    Attributes:
        unparsed: answers that the parser could not read, of all questions.
        missing: questions without a stored output; they count as wrong.
        unknown: stored ids that the data do not have; they are left out.
    """

    columns: list[Column]
    unparsed: Tally
    missing: int = 0
    unknown: int = 0

    def __getitem__(self, name: str) -> Tally | Mean:
        for column in self.columns:
            if column.name == name and column.value is not None:
                return column.value
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """Plain data: {"columns": [{"name", "k", "n", "accuracy", "stderr", "low", "high"} |
        {"name", "mean", "n", "stderr"} | {"name", "unavailable"}], "unparsed": {"k", "n", "rate"}, "missing",
        "unknown"}. Rates are fractions."""
        rate = self.unparsed.accuracy if self.unparsed.n else 0.0
        return {
            "columns": [column.to_json() for column in self.columns],
            "unparsed": {"k": self.unparsed.k, "n": self.unparsed.n, "rate": rate},
            "missing": self.missing,
            "unknown": self.unknown,
        }


def tally(rows: Iterable[dict[str, Any]], columns: Sequence[str], unavailable: dict[str, str] | None = None) -> Scores:
    """Count the results of `process_results`, one dict a question.

    Args:
        rows: column -> value for each column that the question belongs to, and `unparsed`.
        columns: names in the order of the table; others are left out.
        unavailable: columns that the data cannot give -> reason.
    """
    values: dict[str, list[Any]] = {name: [] for name in (*columns, UNPARSED)}
    total = 0
    for row in rows:
        total += 1
        for name, value in row.items():
            if name in values:
                values[name].append(value)
    reasons = unavailable or {}
    return Scores(
        columns=[_column(name, values[name], reasons.get(name, "")) for name in columns],
        unparsed=Tally(sum(map(bool, values[UNPARSED])), total),
    )


def _column(name: str, values: list[Any], reason: str) -> Column:
    if reason or not values:
        return Column(name, unavailable=reason or "no question belongs to it")
    if not all(isinstance(value, int | float) or hasattr(value, "__float__") for value in values):
        return Column(name, unavailable="not a number per question")
    numbers = [float(value) for value in values]
    if all(number in (0.0, 1.0) for number in numbers):
        return Column(name, Tally(int(sum(numbers)), len(numbers)))
    return Column(name, Mean.of(numbers))


def score_file(path: str | Path, task: TaskSpec, seed: int = 0) -> Scores:
    """Score outputs that are already stored.

    Reads LLaVA's result file (`{"outputs": {id: text}}`), LLaVA's answers (JSON lines with `question_id` and
    `text`) and our own (JSON lines with `id` and `answer`). Where no parser is asked for, LLaVA's files get
    the one that the task names for them. Of two outputs for one question the later counts.

    Args:
        path: the file of outputs.
        task: what was asked; its data hold the right answers.
        seed: of parsers that guess.

    Raises:
        UserError: an empty, torn or foreign file, or one that answers none of the task's questions.
    """
    path = Path(path)
    outputs, own = read_outputs(path)
    loaded = load_task(task.model_copy(update={"answers": "generate"}), seed)
    if not own and task.parser is None and loaded.stored_parser:
        parser = {"answers": "generate", "parser": loaded.stored_parser}
        loaded = load_task(task.model_copy(update=parser), seed)
    if loaded.letter:
        message = f"the task '{loaded.name}' compares likelihoods; there is no text to score"
        raise UserError(Problem(message, ("task", "name")))
    known = set(loaded.ids)
    strangers = [] if task.limit else [name for name in outputs if name not in known]
    if not known & outputs.keys():
        message = f"{path}: no id of the {len(outputs)} outputs is in the data ({_few(outputs)}; "
        raise UserError(Problem(f"{message}the data have {_few(loaded.ids)})", WHERE))
    if strangers and getattr(loaded.docs, "numbered", False):
        message = f"{path}: {len(strangers)} of {len(outputs)} ids are not in the data, which have no `pid` and are "
        raise UserError(Problem(f"{message}numbered by row; name data that have the column", WHERE))
    if strangers:
        LOG.warning("%s: %d outputs are not in the data: %s", path, len(strangers), _few(strangers))
    scores = tally(_rows(loaded, outputs), loaded.columns, loaded.unavailable)
    missing = len(known - outputs.keys())
    return Scores(scores.columns, scores.unparsed, missing=missing, unknown=len(strangers))


def _rows(loaded: LoadedTask, outputs: dict[str, str]) -> Iterable[dict[str, Any]]:
    for name, doc in zip(loaded.ids, loaded.docs, strict=False):
        row = loaded.task.process_results(doc, [outputs.get(name, "")])
        # Zeroed, not parsed: a parser that guesses must not be right about what nobody answered.
        yield row if name in outputs else dict.fromkeys(row, 0.0)


def read_outputs(path: Path) -> tuple[dict[str, str], bool]:
    """Stored outputs, id -> text, and whether the file is in our own format.

    Raises:
        UserError: as `score_file`, with the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(Problem(f"{path}: cannot be read ({reason})", WHERE)) from None
    if not text.strip():
        raise UserError(Problem(f"{path}: empty", WHERE))
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        whole, torn = None, error
    except RecursionError:
        raise UserError(Problem(f"{path}: nested too deeply", WHERE)) from None
    if isinstance(whole, dict) and "outputs" in whole:
        return _result_file(path, whole["outputs"]), False
    if whole is None and text.lstrip().startswith("{\n"):
        raise UserError(Problem(f"{path}: not complete JSON ({torn.msg})", WHERE, line=torn.lineno))
    if whole is not None and not (isinstance(whole, dict) and whole.keys() & {"id", "question_id"}):
        raise UserError(Problem(f"{path}: neither a result file with `outputs` nor JSON lines", WHERE))
    return _lines(path, text)


def _result_file(path: Path, outputs: Any) -> dict[str, str]:
    if not isinstance(outputs, dict) or not all(isinstance(value, str) for value in outputs.values()):
        raise UserError(Problem(f"{path}: `outputs` is not a map from id to text", WHERE))
    if not outputs:
        raise UserError(Problem(f"{path}: `outputs` is empty", WHERE))
    return outputs


def _lines(path: Path, text: str) -> tuple[dict[str, str], bool]:
    outputs: dict[str, str] = {}
    own = False
    # Not splitlines: an answer may hold a line separator that JSON leaves unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            message = f"{path}: not a complete JSON object ({error.msg})"
            raise UserError(Problem(message, WHERE, line=number)) from None
        name, answer, own = _record(record)
        if not isinstance(name, str | int) or not isinstance(answer, str):
            message = f"{path}: needs `id` and `answer`, or `question_id` and `text`"
            raise UserError(Problem(message, WHERE, line=number))
        outputs[str(name)] = answer
    return outputs, own


def _record(record: Any) -> tuple[Any, Any, bool]:
    if not isinstance(record, dict):
        return None, None, False
    if "question_id" in record:
        return record["question_id"], record.get("text"), False
    return record.get("id"), record.get("answer"), True


def _few(names: Iterable[str]) -> str:
    listed = [name for name, _ in zip(names, range(SHOWN + 1), strict=False)]
    return ", ".join(listed[:SHOWN]) + (", ..." if len(listed) > SHOWN else "")
