"""Two runs on the same questions: what changed, and whether that can be chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binom, false_discovery_control

from qapbench.errors import UserError, nearest
from qapbench.records.answer import Answer
from qapbench.records.load import load_records, read_scored_questions
from qapbench.records.record import SCORED, Record, read_record
from qapbench.records.store import answers_of

BOOTSTRAP = 10_000
OVERALL = -1  # the last column of a task is its overall accuracy


@dataclass(frozen=True)
class Scored:
    """A run's record, its score of every question (column -> 0 or 1, by question id), and where they lie."""

    record: Record
    rows: dict[str, dict[str, float]]
    folder: Path | None = None

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def columns(self) -> list[str]:
        """Columns that count right answers, in the order of the table."""
        return [column.name for column in self.record.scores.columns if column.k is not None]

    def answers(self) -> dict[str, Answer]:
        """The stored answer to each question, by its id; empty where there are none."""
        return {answer.id: answer for answer in answers_of(self.folder).read()} if self.folder else {}


@dataclass(frozen=True)
class Difference:
    """One column of a comparison.

    Attributes:
        n: questions that both runs answered; first, second: right answers of each.
        gained, lost: questions that only the second, or only the first, answered right.
        low, high: 95 % interval of the difference in accuracy (second - first), bootstrap over questions.
        p: exact McNemar test, two-sided: could the flips be a fair coin's?
        q: p by Benjamini-Hochberg among the tests that are read together.
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
        return (self.second - self.first) / self.n


@dataclass(frozen=True)
class Comparison:
    """Differences by column, and the flipped questions in both directions."""

    first: str
    second: str
    differences: list[Difference]
    gained: list[str]
    lost: list[str]

    def to_json(self) -> dict[str, Any]:
        columns = [{**vars(d), "difference": d.difference} for d in self.differences]
        return {
            "first": self.first,
            "second": self.second,
            "columns": columns,
            "gained": self.gained,
            "lost": self.lost,
        }


def find_run(name: str, runs: Path) -> Path:
    """A run's folder: by path, by the start of its id, or by its name.

    Raises:
        UserError: no such run, or several.
    """
    if (Path(name) / SCORED).exists():
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


def read_scored(folder: Path) -> Scored:
    """The record and the scored questions of a run.

    Raises:
        UserError: one of them is not there, or damaged.
    """
    rows = {scored.id: dict(scored.metrics) for scored in read_scored_questions(folder)}
    return Scored(read_record(folder), rows, folder)


def compare(first: Scored, second: Scored, seed: int = 0) -> Comparison:
    """Paired comparison on the questions that both runs answered; q over the columns.

    Raises:
        UserError: the runs answered different data.
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
    """Ids of the questions that only the second, and that only the first, answered right."""
    both = [(q, first.rows[q].get(column), row.get(column)) for q, row in second.rows.items() if q in first.rows]
    return [q for q, a, b in both if (a, b) == (0, 1)], [q for q, a, b in both if (a, b) == (1, 0)]


def paired_difference(column: str, pair: np.ndarray, seed: int = 0) -> Difference:
    """The difference of two runs on one column, from [n, 2] right or wrong, n > 0."""
    n = len(pair)
    gained, lost = int((~pair[:, 0] & pair[:, 1]).sum()), int((pair[:, 0] & ~pair[:, 1]).sum())
    # Resampling questions is drawing the counts of (gained, lost, same): a multinomial, exact and cheap.
    draws = np.random.default_rng(seed).multinomial(n, [gained / n, lost / n, 1 - (gained + lost) / n], BOOTSTRAP)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, [0.025, 0.975])
    first, second = (int(side.sum()) for side in pair.T)
    p = float(mcnemar(gained, lost))
    return Difference(column, n, first, second, gained, lost, float(low), float(high), p)


def mcnemar(gained: np.ndarray | int, lost: np.ndarray | int) -> np.ndarray:
    """p of the exact two-sided McNemar test: `gained` of gained + lost flips, were each a fair coin's. Elementwise."""
    fewer = np.minimum(gained, lost)
    return np.minimum(2 * binom.cdf(fewer, np.add(gained, lost), 0.5), 1.0)


def corrected(differences: Sequence[Difference]) -> list[Difference]:
    """The differences with their q: Benjamini-Hochberg over all of them."""
    if not differences:
        return []
    adjusted = false_discovery_control([difference.p for difference in differences])
    return [replace(difference, q=float(q)) for difference, q in zip(differences, adjusted, strict=True)]


def caveats(first: Scored, second: Scored) -> list[str]:
    """What a reader of a comparison has to know: the notes of either run."""
    notes = [note for run in (first, second) for note in run.record.notes]
    return list(dict.fromkeys(notes))
