"""Values that must be right to the last bit, and starting values that training hides."""

import itertools
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from qapbench import Selection
from qapbench.methods.normal_float import dynamic_levels
from qapbench.strategies.ptq.omniquant import FLOOR, OmniQuant


def test_dynamic_levels_are_exact() -> None:
    """Midpoints of 2^i equal steps from 0.1 to 1, times 10^(i - 6), rounded to float32 once (Dettmers, section 2.1)."""
    positive = []
    for decade in range(7):
        steps = 2**decade
        edges = [Fraction(1, 10) + Fraction(9, 10) * step / steps for step in range(steps + 1)]
        middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
        positive += [middle * Fraction(10) ** (decade - 6) for middle in middles]
    wanted = np.sort([float(value) for value in [*(-one for one in positive), Fraction(0), *positive, Fraction(1)]])
    assert np.array_equal(dynamic_levels().numpy(), wanted.astype(np.float32))


def test_one_selection_stacked_is_itself() -> None:
    one = Selection(torch.tensor([[0, 2]]), torch.ones(1, 1, 3), "patches", 1)
    stacked = Selection.stack([one])
    assert torch.equal(stacked.indices, one.indices)
    assert stacked.merged is not None
    assert (stacked.merged.shape, stacked.space, stacked.front) == ((1, 1, 3), "patches", 1)


def test_omniquant_starts_at_the_scale_of_smoothquant() -> None:
    """max|x|^alpha / max|w|^(1 - alpha) of the linears that share the input, not below the floor."""
    draw = torch.Generator().manual_seed(0)
    linears = {name: torch.nn.Linear(6, 4) for name in ("q", "k")}
    for linear in linears.values():
        linear.weight.data = 3 * torch.randn(4, 6, generator=draw)
    largest = torch.rand(6, generator=draw) * 10 + 0.1
    group: Any = SimpleNamespace(linears=linears)
    block: Any = SimpleNamespace(groups=lambda: [group])
    inputs: Any = {name: SimpleNamespace(value=largest) for name in linears}
    for alpha in (0.0, 0.3, 1.0):
        found = OmniQuant(alpha=alpha).start(block, inputs)
        weight = np.max([linear.weight.detach().abs().double().numpy() for linear in linears.values()], axis=(0, 1))
        wanted = np.maximum(largest.double().numpy() ** alpha / weight ** (1 - alpha), FLOOR)
        for name in linears:
            np.testing.assert_allclose(found[name].numpy(), wanted, rtol=1e-5)
