"""Ranks and corrections, against tests done one by one by other hands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_rel
from small_records import small_record
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportions_ztest

from qapbench.analysis.paired import Scored, corrected, mcnemar, paired_difference
from qapbench.analysis.ranking import FALSE_DISCOVERIES, count_ranks, paired_ranks, rankings, unpaired_difference

FLIPS = st.integers(0, 300)


@settings(max_examples=60, deadline=None)
@given(gained=FLIPS, lost=FLIPS)
def test_mcnemar_is_the_exact_binomial_test(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert float(mcnemar(gained, lost)) == pytest.approx(expected, abs=1e-12)
    table = [[5, lost], [gained, 7]]
    assert float(mcnemar(gained, lost)) == pytest.approx(float(reference_mcnemar(table, exact=True).pvalue), abs=1e-12)


def test_mcnemar_is_elementwise() -> None:
    gained, lost = np.array([[0, 3], [9, 1]]), np.array([[0, 9], [3, 1]])
    assert mcnemar(gained, lost) == pytest.approx(np.array([[1.0, float(mcnemar(3, 9))], [float(mcnemar(9, 3)), 1.0]]))


def test_q_is_benjamini_hochberg() -> None:
    draw = np.random.default_rng(0)
    found = [paired_difference("Avg", draw.random((200, 2)) < (0.5, share)) for share in (0.5, 0.55, 0.6, 0.7, 0.8)]
    expected = multipletests([one.p for one in found], method="fdr_bh")[1]
    assert [one.q for one in corrected(found)] == pytest.approx(list(expected))
    assert corrected([]) == []


def naive_ranks(right: np.ndarray) -> list[int]:
    pairs = [(i, j) for i in range(len(right)) for j in range(i + 1, len(right))]
    flips = [(int((~right[i] & right[j]).sum()), int((right[i] & ~right[j]).sum())) for i, j in pairs]
    ps = [binomtest(g, g + lost).pvalue if g + lost else 1.0 for g, lost in flips]
    real = multipletests(ps, alpha=FALSE_DISCOVERIES, method="fdr_bh")[0] if ps else []
    ranks = [1] * len(right)
    for (i, j), (gained, lost), sure in zip(pairs, flips, real, strict=True):
        if sure:
            ranks[i if gained > lost else j] += 1
    return ranks


@pytest.mark.parametrize("seed", range(6))
def test_ranks_are_those_of_tests_done_pair_by_pair(seed: int) -> None:
    draw = np.random.default_rng(seed)
    right = draw.random((9, 250)) < draw.uniform(0.4, 0.8, (9, 1))
    assert paired_ranks(right) == naive_ranks(right)


def test_rows_that_nothing_separates_share_the_first_rank() -> None:
    right = np.random.default_rng(3).random((1, 400)) < 0.6
    close = np.repeat(right, 4, axis=0)
    close[1, :3] ^= True
    far = close[:1].copy()
    far[0, :150] = False
    assert paired_ranks(np.concatenate([close, far])) == [1, 1, 1, 1, 5]
    assert paired_ranks(right) == [1]


def test_ranks_of_counts_are_two_sample_tests() -> None:
    counts, n = [3429, 3426, 3334, 2571], 4241
    p = proportions_ztest([counts[0], counts[2]], [n, n])[1]
    assert unpaired_difference("Avg", counts[2], counts[0], n).p == pytest.approx(float(p))
    assert count_ranks(counts, n) == [1, 1, 3, 4]
    assert count_ranks([5], 10) == [1]
    one = unpaired_difference("Avg", counts[2], counts[0], n)
    assert one.difference == pytest.approx(95 / n)
    assert one.low < one.difference < one.high


def run(name: str, right: list[int], prune: Any = None, created: str = "1", model: str = "m") -> Scored:
    spec = {"quantize": {"bits": 4}, "prune": prune, "seed": 0}
    content = {"data": "d", "model": model}
    record = small_record([{"name": "Avg", "k": 0}], name=name, created=created, spec=spec, fingerprints=content)
    return Scored(record, {f"q{i}": {"Avg": float(r)} for i, r in enumerate(right)})


def test_references_are_the_rows_that_differ_in_nothing_else() -> None:
    semantic = {"method": "cdpruner", "keep": 4, "sensitivity": None, "fusion": None}
    fused = {**semantic, "sensitivity": "l2", "fusion": {"convex": {"semantic": 0.7}}}
    rows = [
        run("dense", [1, 0, 1, 0]),
        run("semantic", [1, 0, 0, 0], semantic),
        run("fused", [1, 1, 1, 1], fused),
        run("other budget", [0, 0, 0, 0], {**semantic, "keep": 8}),
        run("other model", [1, 1, 1, 1], None, model="x"),
        run("newer dense", [0, 0, 0, 0], None, created="2"),
        None,
    ]
    found = rankings(rows)
    against = {kind: one.row for kind, one in (found[2].against or {}).items()}
    assert against == {"dense": 5, "semantic": 1}
    assert found[2].against["semantic"].difference.gained == 3  # type: ignore[index]
    assert {kind: one.row for kind, one in (found[3].against or {}).items()} == {"dense": 5}
    assert found[0].against == {}
    assert found[6].rank is None
    assert [one.among for one in found] == [6] * 6 + [0]


def test_rows_on_other_questions_are_not_compared() -> None:
    semantic = {"method": "cdpruner", "keep": 4, "sensitivity": None, "fusion": None}
    found = rankings([run("dense", [1, 0, 1]), run("semantic", [1, 0], semantic)])
    assert [one.among for one in found] == [1, 1]
    assert [one.rank for one in found] == [None, None]
    assert found[1].against == {}


@pytest.mark.parametrize("seed", range(3))
def test_scores_that_are_not_right_or_wrong_are_paired_by_students_t(seed: int) -> None:
    draw = np.random.default_rng(seed)
    values = np.round(draw.random((6, 80)), 1) + np.linspace(0, 0.3, 6)[:, None] * draw.random((6, 80))
    for i, j in ((0, 5), (1, 2)):
        found = paired_difference("anls", values[[i, j]].T)
        expected = ttest_rel(values[j], values[i])
        interval = expected.confidence_interval(0.95)
        assert found.p == pytest.approx(expected.pvalue)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
        assert found.difference == pytest.approx(values[j].mean() - values[i].mean())
        assert (found.gained, found.lost) == ((values[j] > values[i]).sum(), (values[j] < values[i]).sum())
        assert not found.counts
    pairs = [(i, j) for i in range(6) for j in range(i + 1, 6)]
    real = multipletests([ttest_rel(values[i], values[j]).pvalue for i, j in pairs], method="fdr_bh")[0]
    ranks = [1] * 6
    for (i, j), sure in zip(pairs, real, strict=True):
        if sure:
            ranks[i if values[i].mean() < values[j].mean() else j] += 1
    assert paired_ranks(values) == ranks


def test_scores_without_spread_are_not_told_apart() -> None:
    same = np.full((5, 2), 0.3)
    assert paired_difference("anls", same).p == 1
    assert paired_difference("anls", np.array([[0.3, 0.6]])).p == 1, "of one question"
    assert paired_ranks(np.full((3, 4), 0.1)) == [1, 1, 1]


def test_a_lower_score_ranks_first_where_it_is_better() -> None:
    draw = np.random.default_rng(0)
    runs = []
    for name, level in (("good", 0.1), ("bad", 0.6)):
        rows = {f"q{i}": {"error": level + value} for i, value in enumerate(draw.random(40) / 10)}
        column = {"name": "error", "mean": level, "n": 40, "lower": True}
        runs.append(Scored(small_record([column], name=name, fingerprints={"data": "d"}), rows))
    assert [one.rank for one in rankings(runs)] == [1, 2]
