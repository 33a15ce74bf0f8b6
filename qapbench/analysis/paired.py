"""Two runs on the same questions: what changed, and whether that can be chance."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from qapbench.errors import UserError, nearest
from qapbench.run.record import SCORED, Record, read_record, read_records

BOOTSTRAP = 10_000
OVERALL = -1  # the last column of a task is its overall accuracy


@dataclass(frozen=True)
class Scored:
    """A run's record and its score of every question, column -> 0 or 1, by question id."""

    record: Record
    rows: dict[str, dict[str, float]]

    @property
    def name(self) -> str:
        return str(self.record["name"])

    @property
    def columns(self) -> list[str]:
        return [column["name"] for column in self.record["scores"]["columns"] if "k" in column]


@dataclass(frozen=True)
class Difference:
    """One column of a comparison.

    Attributes:
        n: questions that both runs answered; first, second: right answers of each.
        gained, lost: questions that only the second, or only the first, answered right.
        low, high: 95 % interval of the difference in accuracy (second - first), bootstrap over questions.
        p: exact McNemar test, two-sided: could the flips be a fair coin's?
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
            "first": self.first, "second": self.second, "columns": columns, "gained": self.gained, "lost": self.lost,
        }  # fmt: skip


def find_run(name: str, runs: Path) -> Path:
    """A run's folder: by path, by the start of its id, or by its name.

    Raises:
        UserError: no such run, or several.
    """
    if (Path(name) / SCORED).exists():
        return Path(name)
    records = read_records(runs)
    found = [r for r in records if r["run_id"].startswith(name)] or [r for r in records if r["name"] == name]
    if not found:
        known = [word for record in records for word in (record["name"], record["run_id"])]
        raise UserError(f"no run '{name}' below {runs}; {nearest(name, known)}")
    if len(found) > 1:
        listed = ", ".join(f"{record['run_id']} ({record['name']})" for record in found)
        raise UserError(f"'{name}' is {len(found)} runs below {runs}: {listed}; give more of the id")
    return runs / found[0]["run_id"]


def read_scored(folder: Path) -> Scored:
    """The record and the scored questions of a run."""
    try:
        lines = (folder / SCORED).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{folder / SCORED} cannot be read: {error.strerror}") from None
    rows = {row["id"]: row["metrics"] for row in map(json.loads, lines)}
    return Scored(read_record(folder), rows)


def compare(first: Scored, second: Scored, seed: int = 0) -> Comparison:
    """Paired comparison on the questions that both runs answered.

    Raises:
        UserError: the runs answered different data.
    """
    data = [scored.record["fingerprints"].get("data") for scored in (first, second)]
    if data[0] != data[1]:
        raise UserError(f"'{first.name}' and '{second.name}' answered different data; nothing can be paired")
    shared = [name for name in first.rows if name in second.rows]
    names = [name for name in first.columns if name in second.columns]
    if not shared or not names:
        raise UserError(f"'{first.name}' and '{second.name}' have no question or no column in common")
    differences = []
    for name in names:
        asked = [q for q in shared if name in first.rows[q] and name in second.rows[q]]
        pair = np.array([(first.rows[q][name], second.rows[q][name]) for q in asked], dtype=bool).reshape(-1, 2)
        differences.append(_difference(name, pair, seed))
    overall = names[OVERALL]
    flips = [(q, first.rows[q].get(overall), second.rows[q].get(overall)) for q in shared]
    return Comparison(
        first.name, second.name, differences,
        [q for q, a, b in flips if a == 0 and b == 1], [q for q, a, b in flips if a == 1 and b == 0],
    )  # fmt: skip


def _difference(name: str, pair: np.ndarray, seed: int) -> Difference:
    n = len(pair)
    gained, lost = int((~pair[:, 0] & pair[:, 1]).sum()), int((pair[:, 0] & ~pair[:, 1]).sum())
    # Resampling questions is drawing the counts of (gained, lost, same): a multinomial, exact and cheap.
    draws = np.random.default_rng(seed).multinomial(n, [gained / n, lost / n, 1 - (gained + lost) / n], BOOTSTRAP)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / n, [0.025, 0.975])
    p = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    first, second = (int(column.sum()) for column in pair.T)
    return Difference(name, n, first, second, gained, lost, float(low), float(high), p)
