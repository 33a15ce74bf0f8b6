"""The benchmark that averages the difference of two rows over cells, and tests it over questions."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from benchmarks.claim_over import cell_difference, cells_of, gains, pooled
from qapbench import UserError
from qapbench.running import run
from qapbench.spec.spec_file import load_spec

SPEC = """
name: cells
model: diagram-llava
task: {name: diagramqa, limit: 9}
prune: {method: cdpruner, keep: 4}
matrix:
  prune.sensitivity: [null, l2]
cases:
  few: {}
  more: {prune.keep: 9}
"""


def test_a_mean_over_cells_is_tested_over_questions(tmp_path: Path) -> None:
    (tmp_path / "cells.yaml").write_text(SPEC)
    run(load_spec(str(tmp_path / "cells.yaml")), tmp_path / "runs", device="cpu")
    cells = cells_of(tmp_path / "runs")
    assert {name: set(rows) for name, rows in cells.items()} == {"few": {"none", "l2"}, "more": {"none", "l2"}}
    mean = gains(cells.values(), "l2", "none")
    for question, gain in mean.items():
        right = [cell[row].rows[question][str(cell[row].score)] for cell in cells.values() for row in ("l2", "none")]
        assert gain == (right[0] - right[1] + right[2] - right[3]) / 2
    assert list(cells_of(tmp_path / "runs", ["m*"])) == ["more"] == list(cells_of(tmp_path / "runs", without=["few"]))
    assert cell_difference(cells["few"], "l2", "none").n == 9
    with pytest.raises(UserError, match="no row 'l3'; did you mean 'l2'"):
        cell_difference(cells["few"], "l3", "none")
    with pytest.raises(UserError, match=r"no run of a case fwe .*'few'"):
        cells_of(tmp_path / "runs", ["fwe"])


def test_the_pooled_test_is_students() -> None:
    draw = np.random.default_rng(0)
    gained = {str(number): gain for number, gain in enumerate(draw.choice([-0.5, 0, 0.25, 1], size=200))}
    less = {str(number): gain for number, gain in enumerate(draw.choice([-0.5, 0, 0.5], size=200))}
    for base in (None, less):
        found = pooled(gained, base)
        changes = [gained[q] - (base[q] if base else 0) for q in gained]
        expected = ttest_1samp(changes, 0)
        assert found.p == pytest.approx(float(expected.pvalue))
        assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
        assert found.difference == pytest.approx(float(np.mean(changes)))
