"""Ranks of runs in a table, and the comparison of each run with its references."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from scipy.stats import false_discovery_control, norm

from qapbench.records.record import Record
from qapbench.records.tally import Tally

from .paired import Difference, Scored, corrected, mcnemar, paired_difference, t_test

FALSE_DISCOVERIES = 0.05
"""Accepted share of false discoveries among the differences that a table treats as real."""
Kind = Literal["dense", "semantic"]
"""A reference of a run: its quantizer without pruning, or its pruner without sensitivity."""


@dataclass(frozen=True)
class Against:
    """The comparison of a row with one of its references, in the overall column.

    Attributes:
        row: index of the reference among the rows.
        difference: the row's difference to the reference.
        paired: whether it was compared question by question. If not, the counts were compared as two independent
            samples, since published rows have no answers.
    """

    row: int
    difference: Difference
    paired: bool = True


@dataclass(frozen=True)
class Ranking:
    """The rank of a row among the rows that answered the same questions.

    Attributes:
        rank: 1 + the number of rows that are better and can be told apart (q <= 0.05 over all pairs); None if the row
            has no scores, or no other row answered the same questions.
        among: number of rows that were ranked together, this one included.
        against: comparison with each reference. "dense" is the row's quantizer without pruning, "semantic" is its
            pruner without sensitivity.
        left_out: number of questions that not all of these rows could be asked. Rank and comparisons are on the others.
    """

    rank: int | None = None
    among: int = 0
    against: dict[Kind, Against] | None = None
    left_out: int = 0

    def get(self, kind: Kind) -> Against | None:
        """The comparison with one reference; None if the row has no such reference."""
        return (self.against or {}).get(kind)


def rankings(runs: Sequence[Scored | None]) -> list[Ranking]:
    """The ranking of each run; an empty one for a run without scores.

    Runs are compared if they were to answer the same questions of the same data, on those that all of them answered.
    Benjamini-Hochberg is applied separately to
    two families of tests: all pairs of such a group, which give the ranks, and all comparisons with references.
    """
    return corrected_together(_ranked(runs))


def rankings_by_task(runs: Sequence[Mapping[str, Scored]]) -> dict[str, list[Ranking]]:
    """For each task the ranking of each run in it; an empty one for a run that did not ask the task.

    The comparisons with references are corrected over all tasks together, since they stand in one table.

    Args:
        runs: for each run, label of a task -> its run of that task.
    """
    labels = list(dict.fromkeys(label for tasks in runs for label in tasks))
    found = [ranking for label in labels for ranking in _ranked([tasks.get(label) for tasks in runs])]
    filled = iter(corrected_together(found))
    return {label: [next(filled) for _ in runs] for label in labels}


def _ranked(runs: Sequence[Scored | None]) -> list[Ranking]:
    """The ranking of each run, with comparisons that are not yet corrected for each other."""
    found = [Ranking() for _ in runs]
    groups: dict[Any, list[int]] = {}
    for index, run in enumerate(runs):
        if run is not None and run.score and run.rows:
            data = run.record.fingerprints.get("data")
            asked = run.rows.keys() | {question.id for question in run.record.unanswered}
            groups.setdefault((data, run.score, frozenset(asked)), []).append(index)
    for (_, overall, asked), members in groups.items():
        order = sorted(asked.intersection(*(_at(runs, i).rows for i in members)))
        if not order:
            continue
        right = _scores([_at(runs, i) for i in members], overall, order)
        ranks = paired_ranks(right)
        references = _references([_at(runs, i).record for i in members])
        for place, index in enumerate(members):
            against = {
                kind: Against(members[other], paired_difference(overall, np.stack([right[other], right[place]], 1)))
                for kind, other in references[place].items()
            }
            # A group of one, such as a row that `--fast` stopped on questions of its own, has no rank.
            rank = ranks[place] if len(members) > 1 else None
            found[index] = Ranking(rank, len(members), against, len(asked) - len(order))
    return found


def _scores(runs: Sequence[Scored], column: str, order: Sequence[str]) -> np.ndarray:
    """The scores [runs, questions] in a column, the higher the better; bool if it counts right answers."""
    scores = runs[0].record.scores.column(column)
    if scores is None or scores.mean is None:
        return np.array([[bool(run.rows[q].get(column)) for q in order] for run in runs])
    values = np.array([[run.rows[q].get(column, 0) for q in order] for run in runs], dtype=np.float64)
    return -values if scores.lower else values


def paired_ranks(right: np.ndarray) -> list[int]:
    """Ranks from paired answers.

    Args:
        right: [rows, questions] bool, whether each row answered each question right; or its score.
    """
    if right.dtype != bool:
        n = right.shape[1]
        change, spread = np.empty((2, len(right), len(right)))
        for i, row in enumerate(right):  # one by one: all differences together are rows times as large as the answers
            ahead = right - row  # [j, question]: by how much j is better than i
            change[i], spread[i] = ahead.mean(axis=1), ahead.std(axis=1, ddof=min(1, n - 1))
        return _ranks(t_test(change, spread / np.sqrt(n), n), change > 0)
    hit = right.astype(np.float64)
    gained = np.rint((1 - hit) @ hit.T)  # [i, j]: questions that j answers right and i does not
    return _ranks(mcnemar(gained, gained.T), gained > gained.T)


def count_ranks(counts: Sequence[int], n: int) -> list[int]:
    """Ranks of rows of which only counts are known, by two-sample z tests with a pooled rate.

    Args:
        counts: right answers of each row.
        n: number of questions of every row.
    """
    k = np.asarray(counts, dtype=np.float64)
    return _ranks(_pooled_p(k[None, :], k[:, None], n), k[None, :] > k[:, None])


def _ranks(p: np.ndarray, better: np.ndarray) -> list[int]:
    """1 + the number of better rows, for each row.

    Args:
        p: [rows, rows] p-values of all pairs.
        better: [rows, rows] bool, [i, j] whether j has more right answers than i. It counts if the pair's q is at most
            FALSE_DISCOVERIES.
    """
    upper = np.triu_indices(len(p), k=1)
    q = np.ones_like(p)
    if len(upper[0]):
        q[upper] = false_discovery_control(p[upper])
        q = np.minimum(q, q.T)
    return [1 + int(count) for count in (better & (q <= FALSE_DISCOVERIES)).sum(axis=1)]


def unpaired_difference(column: str, first: int, second: int, n: int) -> Difference:
    """The difference of two independent samples: an interval and a pooled z test. Flips are unknown (0).

    The interval is Newcombe's of two Wilson intervals (method 10 in Statistics in Medicine 17, 1998).

    Args:
        column: name of the column.
        first: right answers of the first sample.
        second: right answers of the second sample.
        n: size of each sample.
    """
    a, b = Tally(first, n), Tally(second, n)
    difference = b.accuracy - a.accuracy
    low = difference - math.hypot(b.accuracy - b.low, a.high - a.accuracy)
    high = difference + math.hypot(a.accuracy - a.low, b.high - b.accuracy)
    p = float(_pooled_p(np.float64(second), np.float64(first), n))
    return Difference(column, n, first, second, 0, 0, low, high, p)


def _pooled_p(a: Any, b: Any, n: int) -> np.ndarray:
    """Two-sided p-value of the z test that a of n and b of n right answers have the same rate; elementwise."""
    rate = (a + b) / (2 * n)
    error = np.sqrt(2 * rate * (1 - rate) / n)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(error > 0, np.abs(a - b) / n / error, 0.0)
    return 2 * norm.sf(z)


def corrected_together(found: Sequence[Ranking]) -> list[Ranking]:
    """The rankings with `q` filled in, by Benjamini-Hochberg over all comparisons with a reference."""
    tests = [(i, kind, against) for i, one in enumerate(found) for kind, against in (one.against or {}).items()]
    adjusted = corrected([against.difference for _, _, against in tests])
    filled: list[dict[Kind, Against]] = [{} for _ in found]
    for (index, kind, against), difference in zip(tests, adjusted, strict=True):
        filled[index][kind] = replace(against, difference=difference)
    return [replace(ranking, against=against) for ranking, against in zip(found, filled, strict=True)]


def _at(runs: Sequence[Scored | None], index: int) -> Scored:
    """The run with that index, which must have scores."""
    run = runs[index]
    if run is None:
        raise LookupError(index)
    return run


def _references(records: Sequence[Record]) -> list[dict[Kind, int]]:
    """For each record, the indices of its references among the records; the newest if several match."""
    settings = [_settings(record) for record in records]
    newest: dict[tuple[str, str], int] = {}
    for index in sorted(range(len(records)), key=lambda i: records[i].created, reverse=True):
        newest.setdefault((settings[index], _json(records[index].spec.get("prune"))), index)
    return [_references_of(record, own, newest) for record, own in zip(records, settings, strict=True)]


def _references_of(record: Record, settings: str, newest: dict[tuple[str, str], int]) -> dict[Kind, int]:
    """The references of one record.

    Args:
        record: the record.
        settings: what its references have in common with it.
        newest: settings and pruning -> index of the newest record that has them.
    """
    prune = record.spec.get("prune")
    if not isinstance(prune, dict):
        return {}
    wanted: dict[Kind, Any] = {"dense": None}
    if prune.get("sensitivity") is not None:
        wanted["semantic"] = {**prune, "sensitivity": None, "fusion": None}
    found = {kind: newest.get((settings, _json(pruning))) for kind, pruning in wanted.items()}
    return {kind: index for kind, index in found.items() if index is not None}


def _settings(record: Record) -> str:
    """What two rows must have in common besides the pruning, to be compared."""
    spec, content = record.spec, record.fingerprints
    read = {k: v for k, v in content.items() if k in ("model", "data", "precision") or k.startswith("ptq ")}
    task = spec.get("task")
    asked = [isinstance(task, dict) and task.get(name) for name in ("answers", "prompt", "parser")]
    return _json([read, asked, spec.get("quantize"), spec.get("seed")])


def _json(value: Any) -> str:
    """The value as text that is equal for equal values."""
    return json.dumps(value, sort_keys=True, default=str)
