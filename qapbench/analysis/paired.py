"""Paired comparison of two runs on the same questions: what changed, and whether chance explains it."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom, false_discovery_control

from qapbench.errors import UserError, nearest
from qapbench.records.answer import Answer, ScoredQuestion
from qapbench.records.intact import damage, described, read_scored_questions
from qapbench.records.load import load_records
from qapbench.records.record import RECORD, SCORED, Record, read_record
from qapbench.records.store import answers_of

BOOTSTRAP = 10_000  # resamples
OVERALL = -1  # index of a task's overall accuracy among its columns


@dataclass(frozen=True)
class Scored:
    """A run and its score of every question.

    Attributes:
        record: the run's record.
        rows: question id -> column -> 0 or 1.
        folder: the run's folder; None if it is not on this machine.
        damage: what of the run's files is damaged, and how to mend it, as a sentence; "" if nothing is.
    """

    record: Record
    rows: dict[str, dict[str, float]]
    folder: Path | None = None
    damage: str = ""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.record.name

    @property
    def columns(self) -> list[str]:
        """Names of the columns that count right answers, in the order of the table."""
        return [column.name for column in self.record.scores.columns if column.k is not None]

    def answers(self, questions: Iterable[str] | None = None) -> dict[str, Answer]:
        """The stored answers by question id; empty if the run has no folder, or no answers that can be read.

        Args:
            questions: ids of the questions whose answers are wanted, which spares parsing the others; all if None.
        """
        if self.folder is None:
            return {}
        store = answers_of(self.folder)
        wanted = None if questions is None else set(questions)
        try:
            found = store.read() if wanted is None else store.mentioning(wanted)
        except OSError:  # told by `damage` already
            return {}
        return {answer.id: answer for answer in found if wanted is None or answer.id in wanted}


@dataclass(frozen=True)
class Difference:
    """The difference of two runs in one column.

    Attributes:
        column: name of the column.
        n: number of questions that both runs answered.
        first: right answers of the first run.
        second: right answers of the second run.
        gained: number of questions that only the second run answered right.
        lost: number of questions that only the first run answered right.
        low: lower end of the 95 % interval of the difference in accuracy (second - first), by bootstrap over questions.
        high: upper end of that interval.
        p: p-value of the exact two-sided McNemar test, whose null hypothesis is that a flip is as likely in either
            direction.
        q: the p-value after Benjamini-Hochberg correction over the tests that are read together; NaN before it.
    """

    column: str
    n: int
    first: int
    second: int
    gained: int
    lost: int
    low: float
    high: float
    p: float
    q: float = math.nan

    @property
    def difference(self) -> float:
        """Accuracy of the second run minus accuracy of the first, as a fraction."""
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
    """

    first: str
    second: str
    differences: list[Difference]
    gained: list[str]
    lost: list[str]

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain data."""
        columns = [{**vars(d), "difference": d.difference} for d in self.differences]
        return {
            "first": self.first,
            "second": self.second,
            "columns": columns,
            "gained": self.gained,
            "lost": self.lost,
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
    if not found:
        known = [word for record in records for word in (record.name, record.run_id)]
        raise UserError(f"no run '{name}' below {runs}; {nearest(name, known)}")
    if len(found) > 1:
        listed = ", ".join(f"{record.run_id} ({record.name})" for record in found)
        raise UserError(f"'{name}' is {len(found)} runs below {runs}: {listed}; give more of the id")
    return runs / found[0].run_id


def read_scored(folder: Path, shared: dict[str, ScoredQuestion] | None = None) -> Scored:
    """Read the record and the scored questions in a run's folder.

    Args:
        folder: the run's folder.
        shared: as for `read_scored_questions`.

    Raises:
        UserError: one of the two files is missing or damaged.
    """
    record = read_record(folder)
    found = damage(folder, record, moved=True)
    told = described(folder, found.values()) if found else ""
    if SCORED in found:
        raise UserError(told)
    rows = {sys.intern(one.id): one.metrics for one in read_scored_questions(folder, shared)}
    scored = Scored(record, rows, folder, told)
    if any(row.get(name, 0) not in (0, 1) for row in scored.rows.values() for name in scored.columns):
        raise UserError(described(folder, [f"{SCORED} does not say for each question whether it was right"]))
    return scored


def compare(first: Scored, second: Scored, seed: int = 0) -> Comparison:
    """Compare two runs on the questions that both answered. The q-values are corrected over the columns.

    Args:
        first: the run to compare with.
        second: the run whose gain is measured.
        seed: of the bootstrap.

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
    differences = []
    for name in names:
        asked = [q for q in shared if name in first.rows[q] and name in second.rows[q]]
        if asked:
            pair = np.array([(first.rows[q][name], second.rows[q][name]) for q in asked], dtype=bool)
            differences.append(paired_difference(name, pair, seed))
    return Comparison(first.name, second.name, corrected(differences), *flipped(first, second, names[OVERALL]))


def flipped(first: Scored, second: Scored, column: str) -> tuple[list[str], list[str]]:
    """Ids of the questions that only the second run answered right, and of those that only the first did.

    Args:
        column: the column whose scores are compared.
    """
    both = [(q, first.rows[q].get(column), row.get(column)) for q, row in second.rows.items() if q in first.rows]
    return [q for q, a, b in both if (a, b) == (0, 1)], [q for q, a, b in both if (a, b) == (1, 0)]


def paired_difference(column: str, pair: np.ndarray, seed: int = 0) -> Difference:
    """The difference of two runs in one column, not yet corrected for other tests.

    Args:
        column: name of the column.
        pair: [n, 2] bool, whether the first and the second run answered each question right; n > 0.
        seed: of the bootstrap.
    """
    n = len(pair)
    gained, lost = int((~pair[:, 0] & pair[:, 1]).sum()), int((pair[:, 0] & ~pair[:, 1]).sum())
    low, high = _bootstrap(n, gained, lost, seed)
    first, second = (int(side.sum()) for side in pair.T)
    p = float(mcnemar(gained, lost))
    return Difference(column, n, first, second, gained, lost, low, high, p)


@functools.lru_cache(maxsize=4096)
def _bootstrap(n: int, gained: int, lost: int, seed: int) -> tuple[float, float]:
    """The 95 % interval of (gained - lost) / n, by bootstrap over n questions."""
    # To resample n questions is to draw the counts (gained, lost, same) from a multinomial: exact, and cheaper.
    draws = np.random.default_rng(seed).multinomial(n, [gained / n, lost / n, 1 - (gained + lost) / n], BOOTSTRAP)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, [0.025, 0.975])
    return float(low), float(high)


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
