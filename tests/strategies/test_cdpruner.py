"""CDPruner's greedy MAP against real determinants, and what the released code gets wrong."""

import hypothesis.strategies as st
import numpy as np
import strategy_oracles as oracle
import torch
from hypothesis import given
from torch.nn.functional import normalize

from qapbench import VisionTokens, pruners
from qapbench.strategies.pruners.cdpruner import greedy_map


@st.composite
def kernels(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows [N, D] and qualities [N], some of them tiny."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, width = draw(st.integers(2, 9)), draw(st.integers(2, 16))
    rows = oracle.unit(rng.normal(loc=draw(st.sampled_from([0.0, 1.0])), size=(count, width)))
    quality = rng.uniform(1e-3, 1, size=count)
    return rows, quality


def our_order(rows: np.ndarray, quality: np.ndarray, keep: int) -> list[int]:
    unit = torch.from_numpy(rows).float()
    return greedy_map((unit @ unit.mT)[None], torch.from_numpy(quality).float()[None], keep)[0].tolist()


@given(kernels())
def test_each_step_maximises_the_determinant(case: tuple[np.ndarray, np.ndarray]) -> None:
    rows, quality = case
    kernel = quality[:, None] * (rows @ rows.T) * quality[None, :]
    keep = len(rows)
    order = our_order(rows, quality, keep)
    assert sorted(order) == list(range(keep))
    compared = 0
    for step, (token, log_gain, lead) in enumerate(oracle.greedy_log_det(kernel, keep)):
        residual = np.exp(log_gain) / quality[token] ** 2
        if not (lead > 1e-5 and residual > 1e-2):
            break  # float32 may differ from here on
        assert order[step] == token
        compared += 1
    assert compared >= min(2, keep, rows.shape[1] - 1)


@given(st.integers(0, 2**32 - 1))
def test_past_the_rank(seed: int) -> None:
    """Rank 3, far more asked for: the first three as the determinant says, every token once."""
    rng = np.random.default_rng(seed)
    rows, quality = oracle.unit(rng.normal(size=(12, 3))), rng.uniform(0.1, 1, size=12)
    kernel = quality[:, None] * (rows @ rows.T) * quality[None, :]
    steps = oracle.greedy_log_det(kernel, 3)
    order = our_order(rows, quality, 12)
    assert sorted(order) == list(range(12))
    for place, (token, _gain, lead) in enumerate(steps):
        if lead <= 1e-5:
            break
        assert order[place] == token


def test_past_the_rank_by_quality() -> None:
    """Two orthogonal directions; after one of each nothing is left to gain, and quality decides."""
    rows = np.eye(2)[[0, 0, 0, 1, 1]]
    quality = np.array([0.2, 0.9, 0.5, 0.3, 0.8])
    assert our_order(rows, quality, 5) == [1, 4, 2, 3, 0]


@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_duplicates_come_last(seed: int, copies: int) -> None:
    """A token and its copy span nothing together: every distinct one is taken before any copy."""
    rng = np.random.default_rng(seed)
    distinct = oracle.unit(rng.normal(size=(6, 32)))
    which = rng.permutation(np.repeat(np.arange(6), copies))
    quality = rng.uniform(0.2, 1, size=6)[which]
    order = our_order(distinct[which], quality, 6 * copies)
    assert sorted(order) == list(range(6 * copies))
    assert len({int(which[token]) for token in order[:6]}) == 6


def test_ties_go_to_the_lower_index() -> None:
    assert our_order(np.eye(5), np.full(5, 0.5), 5) == [0, 1, 2, 3, 4]
    assert our_order(np.ones((5, 1)), np.full(5, 0.5), 5) == [0, 1, 2, 3, 4]


def test_zero_quality_and_zero_tokens() -> None:
    assert our_order(np.eye(4), np.array([0.0, 1.0, 0.0, 0.5]), 4) == [1, 3, 0, 2]
    rows = np.vstack([np.zeros((2, 3)), np.eye(3)])
    assert our_order(rows, np.array([1.0, 0.9, 0.3, 0.2, 0.1]), 5) == [2, 3, 4, 0, 1]


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
