"""CDPruner's greedy MAP against real determinants, and what the released code gets wrong."""

from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
import strategy_oracles as oracle
import torch
from hypothesis import given
from torch.nn.functional import normalize

from qapbench import VisionTokens, pruners
from qapbench.strategies.pruners import dpp
from qapbench.strategies.pruners.dpp import greedy_map, greedy_map_lazy

each_way = pytest.mark.parametrize("way", ["whole", "lazy"])


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> Iterator[None]:
    """So that few tokens are several blocks."""
    held = dpp.BLOCK, dpp.ROWS
    dpp.BLOCK, dpp.ROWS = 3, 2
    yield
    dpp.BLOCK, dpp.ROWS = held


@st.composite
def kernels(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows [N, D] and qualities [N], some of them tiny."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, width = draw(st.integers(2, 9)), draw(st.integers(2, 16))
    rows = oracle.unit(rng.normal(loc=draw(st.sampled_from([0.0, 1.0])), size=(count, width)))
    quality = rng.uniform(1e-3, 1, size=count)
    return rows, quality


def our_order(rows: np.ndarray, quality: np.ndarray, keep: int, way: str) -> list[int]:
    unit, score = torch.from_numpy(rows).float()[None], torch.from_numpy(quality).float()[None]
    return (greedy_map_lazy(unit, score, keep) if way == "lazy" else greedy_map(unit @ unit.mT, score, keep))[
        0
    ].tolist()


@each_way
@given(kernels())
def test_each_step_maximises_the_determinant(way: str, case: tuple[np.ndarray, np.ndarray]) -> None:
    rows, quality = case
    kernel = quality[:, None] * (rows @ rows.T) * quality[None, :]
    keep = len(rows)
    order = our_order(rows, quality, keep, way)
    assert sorted(order) == list(range(keep))
    compared = 0
    for step, (token, log_gain, lead) in enumerate(oracle.greedy_log_det(kernel, keep)):
        residual = np.exp(log_gain) / quality[token] ** 2
        if not (lead > 1e-5 and residual > 1e-2):
            break  # float32 may differ from here on
        assert order[step] == token
        compared += 1
    assert compared >= min(2, keep, rows.shape[1] - 1)


@each_way
@given(st.integers(0, 2**32 - 1))
def test_past_the_rank(way: str, seed: int) -> None:
    """Rank 3, far more asked for: the first three as the determinant says, every token once."""
    rng = np.random.default_rng(seed)
    rows, quality = oracle.unit(rng.normal(size=(12, 3))), rng.uniform(0.1, 1, size=12)
    kernel = quality[:, None] * (rows @ rows.T) * quality[None, :]
    steps = oracle.greedy_log_det(kernel, 3)
    order = our_order(rows, quality, 12, way)
    assert sorted(order) == list(range(12))
    for place, (token, _gain, lead) in enumerate(steps):
        if lead <= 1e-5:
            break
        assert order[place] == token


@each_way
def test_past_the_rank_by_quality(way: str) -> None:
    """Two orthogonal directions; after one of each nothing is left to gain, and quality decides."""
    rows = np.eye(2)[[0, 0, 0, 1, 1]]
    quality = np.array([0.2, 0.9, 0.5, 0.3, 0.8])
    assert our_order(rows, quality, 5, way) == [1, 4, 2, 3, 0]


@each_way
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_duplicates_come_last(way: str, seed: int, copies: int) -> None:
    """A token and its copy span nothing together: every distinct one is taken before any copy."""
    rng = np.random.default_rng(seed)
    distinct = oracle.unit(rng.normal(size=(6, 32)))
    which = rng.permutation(np.repeat(np.arange(6), copies))
    quality = rng.uniform(0.2, 1, size=6)[which]
    order = our_order(distinct[which], quality, 6 * copies, way)
    assert sorted(order) == list(range(6 * copies))
    assert len({int(which[token]) for token in order[:6]}) == 6


@each_way
def test_ties_go_to_the_lower_index(way: str) -> None:
    assert our_order(np.eye(5), np.full(5, 0.5), 5, way) == [0, 1, 2, 3, 4]
    assert our_order(np.ones((5, 1)), np.full(5, 0.5), 5, way) == [0, 1, 2, 3, 4]


@each_way
def test_zero_quality_and_zero_tokens(way: str) -> None:
    assert our_order(np.eye(4), np.array([0.0, 1.0, 0.0, 0.5]), 4, way) == [1, 3, 0, 2]
    rows = np.vstack([np.zeros((2, 3)), np.eye(3)])
    assert our_order(rows, np.array([1.0, 0.9, 0.3, 0.2, 0.1]), 5, way) == [2, 3, 4, 0, 1]


def images(seed: int = 0, count: int = 8, width: int = 12) -> VisionTokens:
    draw = torch.Generator().manual_seed(seed)
    return VisionTokens(
        projected=torch.randn(2, count, width, generator=draw),
        image_embeds=torch.randn(2, count, 6, generator=draw),
        text_embeds=torch.randn(2, 3, 6, generator=draw),
    )


def test_relevance_is_the_negated_mean_cosine() -> None:
    tokens = images()
    assert tokens.image_embeds is not None
    assert tokens.text_embeds is not None
    image, text = (x.double().numpy() for x in (tokens.image_embeds, tokens.text_embeds))
    wanted = -(oracle.unit(image) @ oracle.unit(text).swapaxes(1, 2)).mean(axis=-1)
    got = pruners.create("cdpruner").relevance(tokens).numpy()
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    positive = pruners.create("cdpruner", relevance_sign="positive").relevance(tokens)
    np.testing.assert_allclose(positive.numpy(), -wanted, atol=1e-6)


@given(st.integers(0, 1000), st.integers(1, 7), st.booleans())
def test_whole_method(seed: int, keep: int, fused: bool) -> None:
    """Relevance, per-image normalisation, fusion and kernel, end to end in float64."""
    tokens = images(seed)
    pruner = pruners.create("cdpruner")
    relevance = pruner.relevance(tokens).double().numpy()
    quality = oracle.min_max(relevance)
    sensitivity = tokens.projected.norm(dim=-1) if fused else None
    if sensitivity is not None:
        quality = 0.7 * quality + 0.3 * oracle.min_max(sensitivity.double().numpy())
    got = pruner.select(tokens, keep, sensitivity).indices
    for image in range(2):
        rows = oracle.unit(tokens.projected[image].double().numpy())
        q = quality[image]
        steps = oracle.greedy_log_det(q[:, None] * (rows @ rows.T) * q[None, :], keep)
        if all(lead > 1e-4 and np.exp(gain) / q[token] ** 2 > 1e-2 for token, gain, lead in steps):
            assert got[image].tolist() == sorted(token for token, _gain, _lead in steps)


def test_constant_relevance() -> None:
    """Where the released code divides by zero: diversity alone decides."""
    tokens = images()
    even = VisionTokens(tokens.projected, image_embeds=torch.ones(2, 8, 6), text_embeds=torch.ones(2, 3, 6))
    got = pruners.create("cdpruner").select(even, 5).indices
    unit = normalize(tokens.projected, dim=-1)
    wanted = greedy_map(unit @ unit.mT, torch.ones(2, 8), 5).sort(dim=-1).values
    assert torch.equal(got, wanted)


def test_past_the_rank_through_select() -> None:
    """Rank 4, 24 tokens, budget 23: the released code repeats an index here."""
    draw = torch.Generator().manual_seed(0)
    tokens = VisionTokens(
        projected=torch.randn(2, 24, 4, generator=draw),
        image_embeds=torch.randn(2, 24, 6, generator=draw),
        text_embeds=torch.randn(2, 1, 6, generator=draw),
    )
    for keep in (4, 5, 12, 23):
        indices = pruners.create("cdpruner").select(tokens, keep).indices
        assert all(len(set(row)) == keep for row in indices.tolist())


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from(["spread", "constant", "alike"]))
def test_both_ways_agree(seed: int, width: int, kind: str) -> None:
    """On small whole numbers, where float32 is exact enough that only real ties are ties: also past the rank."""
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.integers(-3, 4, size=(2, 30, width))).float()
    if kind == "alike":
        rows = rows[:, rng.integers(0, 6, size=30)]
    quality = torch.from_numpy(rng.integers(1, 9, size=(2, 30)) / 8).float()
    if kind == "constant":
        quality = torch.ones(2, 30)
    unit = normalize(rows, dim=-1)
    whole = greedy_map((unit.double() @ unit.double().mT), quality.double(), 29)
    lazy = greedy_map_lazy(rows, quality, 29)
    assert torch.equal(lazy.sort(dim=-1).values.diff(dim=-1) > 0, torch.ones(2, 28, dtype=torch.bool))
    for image in range(2):
        kernel = (unit[image].double() @ unit[image].double().mT).numpy()
        scaled = quality[image, :, None].double().numpy() * kernel * quality[image, None].double().numpy()
        for step, (token, log_gain, lead) in enumerate(oracle.greedy_log_det(scaled, 12)):
            if lead < 1e-4 or np.exp(log_gain) < 1e-3:
                break
            assert token == whole[image, step] == lazy[image, step]


def test_what_is_not_read_is_not_computed() -> None:
    """With one token that outshines the others nothing else is looked at."""
    features, quality = torch.randn(50, 8), torch.full((50,), 0.1)
    quality[[7, 3]] = torch.tensor([1.0, 0.9])
    greedy = dpp.LazyGreedy(features, quality, 1)
    assert greedy.run().tolist() == [7]
    assert greedy.seen == dpp.BLOCK
    assert greedy.held <= dpp.ROWS
