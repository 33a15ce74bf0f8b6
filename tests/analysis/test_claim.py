"""The benchmark that compares rows with a control: how large an effect has to be, and what is compared with what."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from benchmarks.claim import lines, smallest_effect
from qapbench import RunSpec, UserError
from qapbench.running import run


def test_an_effect_of_the_smallest_size_is_found_four_times_in_five() -> None:
    """Simulated McNemar tests at p = 0.01; the exact test is a little more cautious than the normal approximation."""
    draw, n, flips = np.random.default_rng(0), 4000, 0.1
    effect = smallest_effect(flips, n)
    assert effect == pytest.approx(3.4175 * math.sqrt(flips / n), rel=1e-3)
    shares = [(flips + effect) / 2, (flips - effect) / 2, 1 - flips]
    found = 0
    for gained, lost, _ in draw.multinomial(n, shares, size=400):
        found += binomtest(int(gained), int(gained + lost)).pvalue <= 0.01
    assert found / 400 == pytest.approx(0.8, abs=0.07)


def test_rows_of_one_model_and_size_are_compared(tmp_path: Path) -> None:
    task = {"name": "diagramqa", "limit": 6}
    prunes = {"constant": {"method": "random", "keep": 4}, "other": {"method": "random", "keep": 9}}
    specs = [
        RunSpec.parse({"name": name, "model": "diagram-llava", "task": task, "prune": prune})
        for name, prune in prunes.items()
    ]
    run(specs, tmp_path, device="cpu")
    control, (other,) = lines(tmp_path, "diagram-llava", 6, "constant", [])
    assert (control.name, other.name, other.n) == ("constant", "other", 6)
    assert other.gained - other.lost == round(6 * (other.right - control.right))
    with pytest.raises(UserError, match="no run 'constnat' of diagram-llava with 6 questions"):
        lines(tmp_path, "diagram-llava", 6, "constnat", [])
