"""What a table of runs can say: who is really better, and what each row is compared with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy.stats import false_discovery_control, norm
from statsmodels.stats.proportion import confint_proportions_2indep

from qapbench.records.record import Record

from .paired import OVERALL, Difference, Scored, corrected, mcnemar, paired_difference

FALSE_DISCOVERIES = 0.05
"""Share of false differences among those that a table calls real."""
Kind = Literal["dense", "semantic"]


@dataclass(frozen=True)
class Against:
    """A row against one of its references, on the overall column.

    Attributes:
        row: the reference's place among the rows.
        paired: by question; else from the counts of two independent samples, which is all that published rows allow.
    """

    row: int
    difference: Difference
    paired: bool = True


@dataclass(frozen=True)
class Ranking:
    """Where a row stands among those that answered the same questions.

    Attributes:
        rank: 1 + the rows that are better and can be told apart (q <= 0.05 over all pairs); None without scores
            or without another row.
        among: rows compared.
        against: its references; "dense" is its quantizer without pruning, "semantic" its pruner without sensitivity.
    """

    rank: int | None = None
    among: int = 0
    against: dict[Kind, Against] | None = None

    def get(self, kind: Kind) -> Against | None:
        return (self.against or {}).get(kind)


def rankings(runs: Sequence[Scored | None]) -> list[Ranking]:
    """The standing of each run; an empty one where a run has no scores.

    Runs are compared where they answered the same questions of the same data. Two families of tests are corrected by
    Benjamini-Hochberg: all pairs of such a group, for the ranks; and all comparisons with references.
    """
    found = [Ranking() for _ in runs]
    groups: dict[Any, list[int]] = {}
    for index, run in enumerate(runs):
        if run is not None and run.columns and run.rows:
            data = run.record.fingerprints.get("data")
            groups.setdefault((data, run.columns[OVERALL], frozenset(run.rows)), []).append(index)
    for (_, overall, questions), members in groups.items():
        order = sorted(questions)
        right = np.array([[bool(_at(runs, i).rows[q].get(overall)) for q in order] for i in members])
        ranks = paired_ranks(right)
        for place, index in enumerate(members):
            against = {
                kind: Against(members[other], paired_difference(overall, np.stack([right[other], right[place]], 1)))
                for kind, other in _references(place, [_at(runs, i).record for i in members]).items()
            }
            # Alone, as a row that stopped early on questions of its own is, a rank would say nothing.
            found[index] = Ranking(ranks[place] if len(members) > 1 else None, len(members), against)
    return corrected_together(found)


def paired_ranks(right: np.ndarray) -> list[int]:
    """Ranks from [rows, questions] right or wrong."""
    hit = right.astype(np.float64)
    gained = np.rint((1 - hit) @ hit.T)  # [i, j]: questions that j answers and i does not
    return _ranks(mcnemar(gained, gained.T), gained > gained.T)


def count_ranks(counts: Sequence[int], n: int) -> list[int]:
    """Ranks from the right answers alone of rows of n questions each: two-sample z test with a pooled rate."""
    k = np.asarray(counts, dtype=np.float64)
    return _ranks(_pooled_p(k[None, :], k[:, None], n), k[None, :] > k[:, None])


def _ranks(p: np.ndarray, better: np.ndarray) -> list[int]:
    """1 + the rows that are better (better[i, j]: j is better than i) with q <= FALSE_DISCOVERIES over all pairs."""
    upper = np.triu_indices(len(p), k=1)
    q = np.ones_like(p)
    if len(upper[0]):
        q[upper] = false_discovery_control(p[upper])
        q = np.minimum(q, q.T)
    return [1 + int(count) for count in (better & (q <= FALSE_DISCOVERIES)).sum(axis=1)]


def unpaired_difference(column: str, first: int, second: int, n: int) -> Difference:
    """Two independent samples of n: Newcombe's interval, pooled z test; flips are unknown (0)."""
    low, high = confint_proportions_2indep(second, n, first, n, method="newcomb")
    p = float(_pooled_p(np.float64(second), np.float64(first), n))
    return Difference(column, n, first, second, 0, 0, float(low), float(high), p)


def _pooled_p(a: Any, b: Any, n: int) -> np.ndarray:
    rate = (a + b) / (2 * n)
    error = np.sqrt(2 * rate * (1 - rate) / n)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(error > 0, np.abs(a - b) / n / error, 0.0)
    return 2 * norm.sf(z)


def corrected_together(found: Sequence[Ranking]) -> list[Ranking]:
    """The standings with the q of every comparison with a reference, over all of them."""
    tests = [(i, kind, against) for i, s in enumerate(found) for kind, against in (s.against or {}).items()]
    adjusted = corrected([against.difference for _, _, against in tests])
    filled: list[dict[Kind, Against]] = [{} for _ in found]
    for (index, kind, against), difference in zip(tests, adjusted, strict=True):
        filled[index][kind] = replace(against, difference=difference)
    return [replace(standing, against=against) for standing, against in zip(found, filled, strict=True)]


def _at(runs: Sequence[Scored | None], index: int) -> Scored:
    run = runs[index]
    if run is None:
        raise LookupError(index)
    return run


def _references(place: int, records: Sequence[Record]) -> dict[Kind, int]:
    """The places of a record's references among the records; the newest where there are several."""
    prune = records[place].spec.get("prune")
    if not isinstance(prune, dict):
        return {}
    wanted: dict[Kind, Any] = {"dense": None}
    if prune.get("sensitivity") is not None:
        wanted["semantic"] = {**prune, "sensitivity": None, "fusion": None}
    found: dict[Kind, int] = {}
    for kind, pruning in wanted.items():
        key = _key(records[place], pruning)
        same = [i for i, other in enumerate(records) if i != place and _key(other, other.spec.get("prune")) == key]
        if same:
            found[kind] = max(same, key=lambda i: records[i].created)
    return found


def _key(record: Record, prune: Any) -> str:
    """What two rows must have in common to be compared, where they are pruned as `prune` says."""
    spec, content = record.spec, record.fingerprints
    read = {k: v for k, v in content.items() if k in ("model", "data", "precision") or k.startswith("ptq ")}
    task = spec.get("task")
    asked = [isinstance(task, dict) and task.get(name) for name in ("answers", "prompt", "parser")]
    return json.dumps([read, asked, spec.get("quantize"), spec.get("seed"), prune], sort_keys=True, default=str)
