"""DivPrune against the max-min rule taken literally."""

import hypothesis.strategies as st
import numpy as np
import pytest
import strategy_oracles as oracle
import torch
from hypothesis import given

from qapbench import VisionTokens, pruners
from qapbench.strategies.pruners.divprune import max_min


def loop(distance: oracle.Array, weight: oracle.Array, keep: int) -> list[tuple[int, float]]:
    """(token, lead over the runner-up) of each step."""
    count = len(weight)
    steps: list[tuple[int, float]] = []
    chosen: list[int] = []
    for _ in range(keep):
        gains: dict[int, float] = {}
        for token in range(count):
            if token not in chosen:
                against = chosen or [other for other in range(count) if other != token]
                gains[token] = weight[token] * min(distance[token, other] for other in against)
        best = max(gains, key=lambda token: (gains[token], -token))
        others = [gain for token, gain in gains.items() if token != best]
        steps.append((best, gains[best] - max(others, default=-np.inf)))
        chosen.append(best)
    return steps


def order_of(distance: oracle.Array, weight: oracle.Array, keep: int) -> list[int]:
    return max_min(torch.from_numpy(distance)[None].float(), torch.from_numpy(weight)[None].float(), keep)[0].tolist()


@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.booleans())
def test_each_step_is_the_farthest(seed: int, count: int, weighted: bool) -> None:
    rng = np.random.default_rng(seed)
    rows = oracle.unit(rng.normal(size=(count, 24)))
    distance = 1 - rows @ rows.T
    distance = (distance + distance.T) / 2
    weight = rng.uniform(0.3, 1, size=count) if weighted else np.ones(count)
    order = order_of(distance, weight, count)
    assert sorted(order) == list(range(count))
    for place, (token, lead) in enumerate(loop(distance, weight, count)):
        if 0 < lead < 1e-5:
            break  # float32 may differ from here on
        assert order[place] == token


@given(st.integers(0, 1000), st.integers(1, 9), st.booleans())
def test_whole_method(seed: int, keep: int, fused: bool) -> None:
    tokens = VisionTokens(torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(seed)))
    sensitivity = tokens.projected.norm(dim=-1) if fused else None
    got = pruners.create("divprune").select(tokens, keep, sensitivity).indices
    weight = np.ones((2, 10))
    if sensitivity is not None:
        weight = 0.7 + 0.3 * oracle.min_max(sensitivity.double().numpy())
    for image in range(2):
        rows = oracle.unit(tokens.projected[image].double().numpy())
        distance = 1 - rows @ rows.T
        steps = loop((distance + distance.T) / 2, weight[image], keep)
        if all(lead == 0 or lead > 1e-5 for _token, lead in steps):
            assert got[image].tolist() == sorted(token for token, _lead in steps)


def test_a_tie_for_the_first_place() -> None:
    """2 and 5 are each other's nearest and farther than all: the lower one is taken, then what is far from it."""
    distance = np.full((6, 6), 0.25)
    distance[2, :], distance[:, 2] = 1.0, 1.0
    distance[5, :], distance[:, 5] = 1.0, 1.0
    np.fill_diagonal(distance, 0)
    assert order_of(distance, np.ones(6), 4) == [2, 0, 5, 1]


def test_duplicates_come_last_by_score() -> None:
    """The reference may choose a token twice; ours takes every direction once, then by score."""
    rows = np.eye(3)[[0, 0, 1, 1, 2, 2]]
    distance = 1 - rows @ rows.T
    weight = np.array([0.5, 0.9, 0.6, 0.2, 0.8, 0.7])
    order = order_of(distance, weight, 6)
    assert {int(rows[token].argmax()) for token in order[:3]} == {0, 1, 2}
    rest = order[3:]
    assert rest == sorted(rest, key=lambda token: -weight[token])
    assert sorted(order) == list(range(6))


@pytest.mark.parametrize("keep", [1, 4, 11])
def test_identical_and_zero_tokens(keep: int) -> None:
    for value in (0.0, 3.0):
        tokens = VisionTokens(torch.full((2, 12, 7), value))
        indices = pruners.create("divprune").select(tokens, keep).indices
        assert indices.tolist() == [list(range(keep))] * 2


def test_sensitivity_decides_between_equals() -> None:
    """Orthogonal tokens are equally far from each other: without sensitivity by index, with it by sensitivity."""
    tokens = VisionTokens(torch.eye(8)[None])
    assert pruners.create("divprune").select(tokens, 3).indices.tolist() == [[0, 1, 2]]
    sensitivity = torch.tensor([[0.0, 5.0, 1.0, 2.0, 7.0, 3.0, 6.0, 4.0]])
    assert pruners.create("divprune").select(tokens, 3, sensitivity).indices.tolist() == [[1, 4, 6]]
