"""Paired comparison of two runs on the same questions: what changed, and whether chance explains it."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.fft import next_fast_len
from scipy.stats import binom, false_discovery_control
from scipy.stats import t as student

from qapbench.errors import UserError, nearest
from qapbench.records.answer import Answer, ScoredQuestion
from qapbench.records.intact import damage, described, read_scored_questions
from qapbench.records.load import load_records
from qapbench.records.record import RECORD, SCORED, Record, read_record
from qapbench.records.store import answers_of

ROUNDING = 1e-12  # more than what rounding moves a sum of probabilities
OVERALL = -1  # index of a task's overall accuracy among its columns
NEEDS_IMAGE = "needs image"
"""Column of the questions that cannot be answered without their image (analysis/strata.py)."""


@dataclass(frozen=True)
class Scored:
    """A run and its score of every question.

    Attributes:
        record: the run's record.
        rows: question id -> column -> 0 or 1.
        folder: the run's folder; None if it is not on this machine.
        damage: what of the run's files is damaged, and how to mend it, as a sentence; "" if nothing is.
        parts: label of a task -> its run, if the run asked several tasks. It then has no rows of its own.
    """

    record: Record
    rows: dict[str, dict[str, float]]
    folder: Path | None = None
    damage: str = ""
    parts: dict[str, Scored] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.record.name

    @property
    def columns(self) -> list[str]:
        """Names of the columns that have a number for every question, in the order of the table."""
        return [column.name for column in self.record.scores.columns if column.k is not None or column.mean is not None]

    @property
    def score(self) -> str | None:
        """Name of the column of the task's score; the last one if that has no number for every question."""
        named = self.record.score
        return named.name if named and named.name in self.columns else next(reversed(self.columns), None)

    @property
    def tasks(self) -> dict[str, Scored]:
        """The runs of one task each that this run consists of, by the label of the task."""
        name = self.record.task.name if self.record.task else str(self.record.spec.get("task"))
        return self.parts or {name: self}

    def answers(self, questions: Iterable[str] | None = None) -> dict[str, Answer]:
        """The stored answers by question id; empty if the run has no folder, or no answers that can be read.

        Args:
            questions: ids of the questions whose answers are wanted, which spares parsing the others; all if None.
        """
        if self.parts:
            return {
                place_in(label, name): answer
                for label, part in self.parts.items()
                for name, answer in part.answers(_inside(label, questions)).items()
            }
        if self.folder is None:
            return {}
        store = answers_of(self.folder)
        wanted = None if questions is None else set(questions)
        try:
            found = store.read() if wanted is None else store.mentioning(wanted)
        except OSError:  # told by `damage` already
            return {}
        return {answer.id: answer for answer in found if wanted is None or answer.id in wanted}


def place_in(label: str, question: str) -> str:
    """Name of a question of one of several tasks."""
    return f"{label}/{question}"


def _inside(label: str, questions: Iterable[str] | None) -> list[str] | None:
    """Ids of those questions that belong to a task; None for all."""
    prefix = place_in(label, "")
    return None if questions is None else [q.removeprefix(prefix) for q in questions if q.startswith(prefix)]


@dataclass(frozen=True)
class Difference:
    """The difference of two runs in one column.

    Attributes:
        column: name of the column.
        n: number of questions that both runs answered.
        first: right answers of the first run, or the sum of its scores.
        second: right answers of the second run, or the sum of its scores.
        gained: number of questions that only the second run answered right, or that it has a higher score for.
        lost: number of questions that only the first run answered right, or that it has a higher score for.
        low: lower end of the 95 % interval of the difference (second - first), by bootstrap over questions, or of
            Student's t.
        high: upper end of that interval.
        p: p-value of the exact two-sided McNemar test, whose null hypothesis is that a flip is as likely in either
            direction. Where scores are not 0 or 1, that of the paired t test.
        q: the p-value after Benjamini-Hochberg correction over the tests that are read together; NaN before it.
        counts: whether every score is 0 or 1.
    """

    column: str
    n: int
    first: float
    second: float
    gained: int
    lost: int
    low: float
    high: float
    p: float
    q: float = math.nan
    counts: bool = True

    @property
    def difference(self) -> float:
        """Accuracy (or mean score) of the second run minus that of the first, as a fraction."""
        return (self.second - self.first) / self.n


@dataclass(frozen=True)
class Comparison:
    """A comparison of two runs.

    Attributes:
        first: name of the first run.
        second: name of the second run.
        differences: one entry per column that both runs have.
        gained: ids of the questions that only the second run answered right, in the overall column.
        lost: ids of the questions that only the first run answered right.
        untested: a sentence for each column that both runs have and that no test can pair by question.
        alone: number of questions that only one of the runs answered, which are left out of everything else.
    """

    first: str
    second: str
    differences: list[Difference]
    gained: list[str]
    lost: list[str]
    untested: list[str] = field(default_factory=list)
    alone: int = 0

    @property
    def left_out(self) -> str:
        """A sentence on the questions that only one of the runs answered; "" if there are none."""
        if not self.alone:
            return ""
        return f"Paired on the questions that both answered: {self.alone} that only one of them answered left out."

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain data."""
        columns = [{**vars(d), "difference": d.difference} for d in self.differences]
        return {
            "first": self.first,
            "second": self.second,
            "columns": columns,
            "gained": self.gained,
            "lost": self.lost,
            "untested": self.untested,
            "alone": self.alone,
        }


def find_run(name: str, runs: Path) -> Path:
    """The folder of a run.

    Args:
        name: its folder, the start of its id, or its name.
        runs: folder of the results.

    Raises:
        UserError: no run matches, or several do.
    """
    if any((Path(name) / file).exists() for file in (RECORD, SCORED)):
        return Path(name)
    records = load_records(runs)
    found = [r for r in records if r.run_id.startswith(name)] or [r for r in records if r.name == name]
    if not found:  # perhaps one task of a run of several
        every = load_records(runs, parts=True)
        found = [r for r in every if r.run_id.startswith(name)] or [r for r in every if r.name == name]
    if not found:
        known = [word for record in records for word in (record.name, record.run_id)]
        raise UserError(f"no run '{name}' below {runs}; {nearest(name, known)}")
    if len(found) > 1:
        listed = ", ".join(f"{record.run_id} ({record.name})" for record in found)
        raise UserError(f"'{name}' is {len(found)} runs below {runs}: {listed}; give more of the id")
    return runs / found[0].run_id


def read_scored(folder: Path, shared: dict[str, ScoredQuestion] | None = None, record: Record | None = None) -> Scored:
    """Read the record and the scored questions in a run's folder.

    Args:
        folder: the run's folder.
        shared: as for `read_scored_questions`.
        record: the run's record, if it was read already.

    Raises:
        UserError: one of the two files is missing or damaged.
    """
    record = read_record(folder) if record is None else record
    if record.parts:
        parts = {part.label: read_scored(folder.resolve().parent / part.run_id, shared) for part in record.parts}
        told = "; ".join(part.damage for part in parts.values() if part.damage)
        return Scored(record, {}, folder, told, parts)
    found = damage(folder, record, moved=True)
    told = described(folder, found.values()) if found else ""
    if SCORED in found:
        raise UserError(told)
    rows = {sys.intern(one.id): one.metrics for one in read_scored_questions(folder, shared)}
    scored = Scored(record, rows, folder, told)
    counted = {column.name for column in record.scores.columns if column.k is not None}
    if not all(_are_scores(rows.values(), name, name in counted) for name in scored.columns):
        raise UserError(described(folder, [f"{SCORED} does not say for each question whether it was right"]))
    return scored


def _are_scores(rows: Iterable[Mapping[str, Any]], column: str, counted: bool) -> bool:
    """Whether every question that has an entry in a column has a number there; 0 or 1, if right answers are counted."""
    try:
        found = {row.get(column, 0) for row in rows}  # far fewer than there are questions
    except TypeError:  # a list or a mapping
        return False
    return found <= {0, 1} if counted else all(isinstance(value, int | float) for value in found)


def compare(first: Scored, second: Scored) -> Comparison:
    """Compare two runs on the questions that both answered. The q-values are corrected over the columns.

    Runs of several tasks are compared in the score of each task that both have.

    Args:
        first: the run to compare with.
        second: the run whose gain is measured.

    Raises:
        UserError: the runs answered different data, or have no question or no column in common.
    """
    if not first.parts and not second.parts:
        differences, gained, lost = _differences(first, second)
        untested, alone = _untested(first, second), _alone(first, second)
    else:
        differences, gained, lost, untested, alone = [], [], [], [], 0
        labels = [label for label in first.tasks if label in second.tasks]
        if not labels:
            raise UserError(f"'{first.name}' and '{second.name}' have no task in common")
        for label in labels:
            one, other = first.tasks[label], second.tasks[label]
            if one.score is None or one.score != other.score:
                untested.append(f"{label}: no column has a number for every question, so nothing can be paired")
                continue
            found, more, less = _differences(one, other)
            apart = [replace(one, column=f"{label}, {NEEDS_IMAGE}") for one in found if one.column == NEEDS_IMAGE]
            differences += [*apart, replace(found[OVERALL], column=label)]
            gained += [place_in(label, question) for question in more]
            lost += [place_in(label, question) for question in less]
            alone += _alone(one, other)
    return Comparison(first.name, second.name, corrected(differences), gained, lost, untested, alone)


def _differences(first: Scored, second: Scored) -> tuple[list[Difference], list[str], list[str]]:
    """The differences of two runs of one task, that of the task's score last, and the flips in it in both directions.

    Raises:
        UserError: the runs answered different data, or have no question or no column in common.
    """
    data = [scored.record.fingerprints.get("data") for scored in (first, second)]
    if data[0] != data[1]:
        raise UserError(f"'{first.name}' and '{second.name}' answered different data; nothing can be paired")
    shared = [name for name in first.rows if name in second.rows]
    names = [name for name in first.columns if name in second.columns]
    if not shared or not names:
        raise UserError(f"'{first.name}' and '{second.name}' have no question or no column in common")
    score = first.score if first.score in names else names[OVERALL]
    differences = []
    for name in sorted(names, key=lambda name: name == score):
        asked = [q for q in shared if name in first.rows[q] and name in second.rows[q]]
        if asked:
            pair = np.array([(first.rows[q][name], second.rows[q][name]) for q in asked], dtype=np.float64)
            differences.append(paired_difference(name, pair))
    return differences, *flipped(first, second, str(score))


def _alone(first: Scored, second: Scored) -> int:
    """Number of questions that only one of two runs of one task answered."""
    return len(first.rows.keys() ^ second.rows.keys())


def _untested(first: Scored, second: Scored) -> list[str]:
    """A sentence for each column of both runs that is one figure over all questions."""
    found = []
    for column in first.record.scores.columns:
        other = second.record.scores.column(column.name)
        if other and column.figure is not None and other.figure is not None:
            values = f"{column.figure:.4g} and {other.figure:.4g}"
            found.append(f"{column.name}: {values}, one figure over all questions each, so there is no paired test")
    return found


def flipped(first: Scored, second: Scored, column: str) -> tuple[list[str], list[str]]:
    """Ids of the questions that only the second run answered right, and of those that only the first did.

    Args:
        column: the column whose scores are compared.
    """
    both = [(q, first.rows[q].get(column), row.get(column)) for q, row in second.rows.items() if q in first.rows]
    known = [(q, a, b) for q, a, b in both if a is not None and b is not None]
    return [q for q, a, b in known if a < b], [q for q, a, b in known if a > b]


def paired_difference(column: str, pair: np.ndarray) -> Difference:
    """The difference of two runs in one column, not yet corrected for other tests.

    Args:
        column: name of the column.
        pair: [n, 2] scores of the first and the second run for each question, 0 or 1 where they count right answers;
            n > 0.
    """
    n = len(pair)
    if pair.dtype != bool and not np.isin(pair, (0, 1)).all():
        return _mean_difference(column, pair)
    pair = pair.astype(bool)
    gained, lost = int((~pair[:, 0] & pair[:, 1]).sum()), int((pair[:, 0] & ~pair[:, 1]).sum())
    low, high = bootstrap_interval(n, gained, lost)
    first, second = (int(side.sum()) for side in pair.T)
    p = float(mcnemar(gained, lost))
    return Difference(column, n, first, second, gained, lost, low, high, p)


def _mean_difference(column: str, pair: np.ndarray) -> Difference:
    """The difference of two runs in a column of scores [n, 2] that are not 0 or 1, by Student's t."""
    n, change = len(pair), pair[:, 1] - pair[:, 0]
    first, second = (float(side) for side in pair.sum(axis=0))
    mean, error = float(change.mean()), float(change.std(ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    half = float(student.ppf(0.975, n - 1)) * error if n > 1 else 0.0
    p = float(t_test(mean, error, n))
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    return Difference(column, n, first, second, gained, lost, mean - half, mean + half, p, counts=False)


def t_test(mean: np.ndarray | float, error: np.ndarray | float, n: int) -> np.ndarray:
    """Two-sided p-value of the paired t test, elementwise; 1 where the scores have no spread to judge by.

    Args:
        mean: mean difference.
        error: its standard error.
        n: number of questions.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.greater(error, 0), 2 * student.sf(np.divide(np.abs(mean), error), max(n - 1, 1)), 1.0)


@functools.lru_cache(maxsize=4096)
def bootstrap_interval(n: int, gained: int, lost: int) -> tuple[float, float]:
    """The 95 % interval of (gained - lost) / n by the percentile bootstrap over n questions, of all resamples at once.

    A resample draws n questions with replacement, each of which adds 1 (gained), -1 (lost) or 0. The distribution of
    the sum is that of one question, convolved n times with itself, which Fourier's transform makes a power. So there
    is nothing to draw, and no seed.

    Args:
        n: number of questions, > 0.
        gained: questions that only the second run answered right.
        lost: questions that only the first run answered right.
    """
    size = next_fast_len(2 * n + 1, real=True)  # sums of -n to n, those below 0 at the end
    one = np.zeros(size)
    one[[0, 1, -1]] = 1 - (gained + lost) / n, gained / n, lost / n
    chance = np.fft.irfft(np.fft.rfft(one) ** n, size)
    below = np.cumsum(np.concatenate([chance[-n:], chance[: n + 1]]))
    low, high = np.searchsorted(below, [0.025 - ROUNDING, 0.975 - ROUNDING]) - n
    return float(low) / n, float(high) / n


def mcnemar(gained: np.ndarray | int, lost: np.ndarray | int) -> np.ndarray:
    """p-value of the exact two-sided McNemar test, elementwise.

    Args:
        gained: flips in one direction.
        lost: flips in the other direction. Under the null hypothesis either direction has probability 1/2.
    """
    fewer = np.minimum(gained, lost)
    return np.minimum(2 * binom.cdf(fewer, np.add(gained, lost), 0.5), 1.0)


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The differences with `q` filled in, by Benjamini-Hochberg over all of them."""
    if not differences:
        return []
    adjusted = false_discovery_control([difference.p for difference in differences])
    return [replace(difference, q=float(q)) for difference, q in zip(differences, adjusted, strict=True)]


def caveats(first: Scored, second: Scored) -> list[str]:
    """The notes of both runs, each once: what a reader of the comparison has to know."""
    notes = [note for run in (first, second) for note in run.record.notes]
    return list(dict.fromkeys(notes))
