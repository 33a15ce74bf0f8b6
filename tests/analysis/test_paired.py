"""Paired comparison of two runs, against formulas worked out by hand."""

from fractions import Fraction
from math import comb
from typing import Any

import numpy as np
import pytest
from small_records import small_record

from qapbench import UserError
from qapbench.analysis import paired
from qapbench.analysis.paired import Scored, bootstrap_interval, compare


def scored(name: str, right: list[int], data: str = "d") -> Scored:
    """Questions q0, q1, ...; the even ones have an image."""
    rows = {f"q{i}": {"Avg": float(r), **({"IMG": float(r)} if i % 2 == 0 else {})} for i, r in enumerate(right)}
    columns: list[dict[str, Any]] = [
        {"name": "IMG", "k": 0},
        {"name": "G1-6", "unavailable": "?"},
        {"name": "Avg", "k": 0},
    ]
    return Scored(small_record(columns, name=name, fingerprints={"data": data}), rows)


def test_counts_flips_and_exact_p() -> None:
    first = scored("a", [1, 1, 1, 0, 0, 0, 0, 0, 0, 1])
    second = scored("b", [1, 1, 0, 1, 1, 1, 1, 1, 1, 1])
    found = compare(first, second)
    image, overall = found.differences
    assert (overall.n, overall.first, overall.second, overall.gained, overall.lost) == (10, 4, 9, 6, 1)
    assert overall.p == pytest.approx(2 * sum(comb(7, k) for k in (0, 1)) / 2**7)
    assert (image.n, image.gained, image.lost) == (5, 3, 1)
    assert found.gained == ["q3", "q4", "q5", "q6", "q7", "q8"]
    assert found.lost == ["q2"]
    assert overall.low < overall.difference < overall.high
    assert overall.difference == 0.5


def test_a_run_against_itself() -> None:
    one = scored("a", [1, 0, 1])
    for difference in compare(one, one).differences:
        assert (difference.p, difference.low, difference.high, difference.gained, difference.lost) == (1, 0, 0, 0, 0)


def test_swapping_runs_swaps_everything() -> None:
    first, second = scored("a", [1, 1, 1, 0] * 20), scored("b", [1, 0, 0, 1] * 20)
    there, back = compare(first, second).differences[-1], compare(second, first).differences[-1]
    assert (there.gained, there.lost, there.p) == (back.lost, back.gained, back.p)
    assert there.low == pytest.approx(-back.high, abs=0.02)


def test_the_interval_covers_as_a_normal_one_does() -> None:
    """Variance of a paired difference: (gained + lost)/n - difference^2, over n."""
    difference = compare(scored("a", [1, 1, 0, 0] * 250), scored("b", [1, 0, 1, 1] * 250)).differences[-1]
    error = ((0.75 - 0.25**2) / 1000) ** 0.5
    assert difference.low == pytest.approx(0.25 - 1.96 * error, abs=0.004)
    assert difference.high == pytest.approx(0.25 + 1.96 * error, abs=0.004)


@pytest.mark.parametrize(("n", "gained", "lost"), [(1, 1, 0), (1, 0, 0), (2, 1, 1), (6, 2, 3), (7, 0, 4), (9, 9, 0)])
def test_the_interval_is_that_of_every_resample(n: int, gained: int, lost: int) -> None:
    """All sums of n draws, in exact fractions."""
    one = {1: Fraction(gained, n), -1: Fraction(lost, n), 0: 1 - Fraction(gained + lost, n)}
    chances = {0: Fraction(1)}
    for _ in range(n):
        drawn: dict[int, Fraction] = {}
        for total, chance in chances.items():
            for step, share in one.items():
                drawn[total + step] = drawn.get(total + step, Fraction(0)) + chance * share
        chances = drawn
    ends = []
    for level in (Fraction(25, 1000), Fraction(975, 1000)):
        below = Fraction(0)
        for total in sorted(chances):
            below += chances[total]
            if below >= level:
                ends.append(total / n)
                break
    assert bootstrap_interval(n, gained, lost) == tuple(ends)


def test_the_interval_is_what_resamples_show() -> None:
    draws = np.random.default_rng(0).multinomial(4241, [90 / 4241, 50 / 4241, 4101 / 4241], 200_000)
    low, high = np.quantile((draws[:, 0] - draws[:, 1]) / 4241, [0.025, 0.975])
    assert bootstrap_interval(4241, 90, 50) == pytest.approx((low, high), abs=1.01 / 4241)


def test_different_data_cannot_be_paired() -> None:
    with pytest.raises(UserError, match="different data"):
        compare(scored("a", [1]), scored("b", [1], data="other"))


def test_a_figure_over_all_questions_has_no_paired_test() -> None:
    runs = []
    for name, figure in (("a", 0.5), ("b", 0.75)):
        columns = [{"name": "acc", "k": 1, "n": 2}, {"name": "f1", "figure": figure, "n": 2}]
        rows = {"q0": {"acc": 1.0, "f1": [0, 0]}, "q1": {"acc": 0.0, "f1": [1, 0]}}
        runs.append(Scored(small_record(columns, name=name, fingerprints={"data": "d"}), rows))
    found = compare(*runs)
    assert [difference.column for difference in found.differences] == ["acc"]
    assert found.untested == ["f1: 0.5 and 0.75, one figure over all questions each, so there is no paired test"]
    assert found.to_json()["untested"] == found.untested


def test_each_task_is_asked_for_its_own_questions() -> None:
    assert paired._inside("a", ["a/1", "b/2", "a/b/2"]) == ["1", "b/2"]
    assert paired._inside("a", None) is None
