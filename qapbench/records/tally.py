"""Counts right answers per column, with Wilson intervals, and takes over what a task aggregates itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

UNPARSED = "unparsed"
"""Key in `process_results` of answers that no rule of the parser could read."""
LEVEL = 0.95
"""Confidence level of every interval."""


@dataclass(frozen=True)
class Tally:
    """Right answers in one column.

    Attributes:
        k: number of right answers.
        n: number of questions.
    """

    k: int
    n: int

    @property
    def accuracy(self) -> float:
        """k / n; NaN if n is 0."""
        return self.k / self.n if self.n else math.nan

    @property
    def stderr(self) -> float:
        """Binomial standard error of the accuracy, sqrt(p (1 - p) / n); NaN if n is 0."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n) if self.n else math.nan

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy; NaN if n is 0."""
        if not self.n:
            return math.nan, math.nan
        from statsmodels.stats.proportion import proportion_confint

        low, high = proportion_confint(self.k, self.n, alpha=1 - LEVEL, method="wilson")
        # Rounding must not exclude an accuracy of 0 or 1.
        return min(float(low), self.accuracy), max(float(high), self.accuracy)

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.interval[0]

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.interval[1]

    def to_json(self) -> dict[str, Any]:
        """The counts, the accuracy and its interval as plain data."""
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
    """The mean of values that do not count right answers, and therefore have no Wilson interval.

    Attributes:
        mean: the mean.
        n: number of values.
        stderr: standard error of the mean; NaN for a single value.
    """

    mean: float
    n: int
    stderr: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of one or more values."""
        n = len(values)
        mean = math.fsum(values) / n
        spread = math.fsum((value - mean) ** 2 for value in values)
        return cls(mean, n, math.sqrt(spread / (n - 1) / n) if n > 1 else math.nan)

    def to_json(self) -> dict[str, Any]:
        """The mean as plain data."""
        # JSON has no NaN.
        return {"mean": self.mean, "n": self.n, "stderr": None if math.isnan(self.stderr) else self.stderr}


@dataclass(frozen=True)
class Figure:
    """A task's own figure over all questions, such as an F1 score or a perplexity, which is no mean over them.

    Attributes:
        figure: the figure.
        n: number of questions.
    """

    figure: float
    n: int

    def to_json(self) -> dict[str, Any]:
        """The figure as plain data."""
        return {"figure": self.figure, "n": self.n}


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: name of the column.
        value: its value; None if it is unavailable.
        unavailable: why there is no value.
    """

    name: str
    value: Tally | Mean | Figure | None = None
    unavailable: str = ""

    def to_json(self) -> dict[str, Any]:
        """The column as plain data."""
        rest = {"unavailable": self.unavailable} if self.value is None else self.value.to_json()
        return {"name": self.name, **rest}


@dataclass(frozen=True)
class Scores:
    """The scores of a run, or of stored outputs.

    Attributes:
        columns: the columns in the task's order.
        unparsed: answers that the parser could not read, of all questions.
        missing: number of questions without a stored output; they count as wrong.
        unknown: number of stored ids that are not in the data; they are left out.
    """

    columns: list[Column]
    unparsed: Tally
    missing: int = 0
    unknown: int = 0

    def __getitem__(self, name: str) -> Tally | Mean | Figure:
        """The value of a column.

        Raises:
            KeyError: there is no such column, or it has no value.
        """
        for column in self.columns:
            if column.name == name and column.value is not None:
                return column.value
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """The scores as plain data; rates are fractions.

        The keys are "columns", "unparsed" ({"k", "n", "rate"}), "missing" and "unknown". A column has a "name" and
        either "k", "n", "accuracy", "stderr", "low" and "high", or "mean", "n" and "stderr", or "figure" and "n", or
        "unavailable".
        """
        rate = self.unparsed.accuracy if self.unparsed.n else 0.0
        return {
            "columns": [column.to_json() for column in self.columns],
            "unparsed": {"k": self.unparsed.k, "n": self.unparsed.n, "rate": rate},
            "missing": self.missing,
            "unknown": self.unknown,
        }


def tally(
    rows: Iterable[dict[str, Any]],
    columns: Sequence[str],
    unavailable: dict[str, str] | None = None,
    figures: Mapping[str, float] | None = None,
) -> Scores:
    """Count the results of `process_results`.

    Args:
        rows: for each question, column -> value for the columns that it belongs to, and `unparsed`.
        columns: names in the order of the table; other columns are left out.
        unavailable: column -> the reason why the data cannot give it.
        figures: column -> the task's own figure over all questions. One that is the mean of numbers per question is
            counted as such, so that it has an interval.
    """
    values: dict[str, list[Any]] = {name: [] for name in (*columns, UNPARSED)}
    total = 0
    for row in rows:
        total += 1
        for name, value in row.items():
            if name in values:
                values[name].append(value)
    reasons, own = unavailable or {}, figures or {}
    return Scores(
        columns=[_column(name, values[name], reasons.get(name, ""), own.get(name)) for name in columns],
        unparsed=Tally(sum(map(bool, values[UNPARSED])), total),
    )


def _column(name: str, values: list[Any], reason: str, figure: float | None) -> Column:
    """The tally of a column whose values are all 0 or 1, the mean of other numbers, or the task's own figure.

    If there is none of these, the column says why.
    """
    if reason or not values:
        return Column(name, unavailable=reason or "no question belongs to it")
    listed = all(isinstance(value, int | float) or hasattr(value, "__float__") for value in values)
    numbers = [float(value) for value in values] if listed else []
    finite = listed and all(map(math.isfinite, numbers))
    if figure is not None and not (finite and math.isclose(figure, math.fsum(numbers) / len(numbers), rel_tol=1e-9)):
        return Column(name, Figure(figure, len(values)))
    if not finite:
        return Column(name, unavailable=f"not a {'finite ' * listed}number {'for every' if listed else 'per'} question")
    if all(number in (0.0, 1.0) for number in numbers):
        return Column(name, Tally(int(sum(numbers)), len(numbers)))
    return Column(name, Mean.of(numbers))
