"""Counts of right answers, per column, with Wilson intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

UNPARSED = "unparsed"
"""The key of process_results that counts answers which no rule of the parser could read."""
LEVEL = 0.95
"""Of every interval."""


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
