"""CDPruner's greedy MAP against real determinants, and what the released code gets wrong."""

from collections.abc import Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
import strategy_oracles as oracle
import torch
from hypothesis import given, settings
from torch import Tensor

from qapbench import VisionTokens, pruners
from qapbench.methods.pruner import Choice
from qapbench.strategies.pruners import cdpruner, dpp
from qapbench.strategies.pruners.dpp import greedy_map, greedy_map_lazy, unit
from qapbench.strategies.pruners.dpp_batch import greedy_map_batch

each_way = pytest.mark.parametrize("way", ["whole", "lazy", "batch"])


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> Iterator[None]:
    """So that few tokens are several blocks."""
    held = dpp.BLOCK, dpp.ROWS, dpp.SMALL
    dpp.BLOCK, dpp.ROWS, dpp.SMALL = 3, 2, 0
    yield
    dpp.BLOCK, dpp.ROWS, dpp.SMALL = held


@st.composite
def kernels(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows [N, D] and qualities [N], some of them tiny."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, width = draw(st.integers(2, 9)), draw(st.integers(2, 16))
    rows = oracle.unit(rng.normal(loc=draw(st.sampled_from([0.0, 1.0])), size=(count, width)))
    quality = rng.uniform(1e-3, 1, size=count)
    return rows, quality


def whole(features: Tensor, quality: Tensor, keep: int) -> Tensor:
    """The way of a GPU."""
    directions = unit(features)
    return greedy_map(directions @ directions.mT, quality, keep)


def batched(features: Tensor, quality: Tensor, keep: int) -> Tensor:
    """The way of small images beside each other, here with a copy and a stranger as neighbours."""
    stranger = torch.randn(features[0].shape, generator=torch.Generator().manual_seed(1))
    several, scores = [features[0], stranger, features[0]], [quality[0], quality[0].flip(0), quality[0]]
    first, _, last = greedy_map_batch(several, scores, keep)
    alone = greedy_map_batch([features[0]], [quality[0]], keep)
    assert torch.equal(first, last) and torch.equal(first, alone[0])
    return alone


def our_order(rows: np.ndarray, quality: np.ndarray, keep: int, way: str) -> list[int]:
    features, score = torch.from_numpy(rows).float()[None], torch.from_numpy(quality).float()[None]
    ways = {"lazy": greedy_map_lazy, "whole": whole, "batch": batched}
    return ways[way](features, score, keep)[0].tolist()


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
    wanted = whole(tokens.projected, torch.ones(2, 8), 5).sort(dim=-1).values
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


KINDS = [
    "plain",
    "whole numbers",
    "copies",
    "scaled copies",
    "low rank",
    "decaying",
    "bfloat16",
    "equal angles",
    "extreme",
]


@st.composite
def images_of_any_kind(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Features [1, N, D] in float32 and qualities [1, N], with ties, copies, and fewer directions than tokens."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, width = draw(st.integers(2, 60)), draw(st.integers(1, 48))
    rows = rng.normal(size=(count, width))
    match draw(st.sampled_from(KINDS)):
        case "whole numbers":
            rows = rng.integers(-2, 3, size=(count, width)).astype(float)
        case "copies":
            rows = rows[rng.integers(0, max(count // 4, 1), size=count)]
        case "scaled copies":
            rows = rows[rng.integers(0, max(count // 4, 1), size=count)] * rng.integers(1, 6, size=(count, 1))
        case "low rank":
            rows = rng.normal(size=(count, 3)) @ rng.normal(size=(3, width))
        case "decaying":
            rows = rows * 10 ** -np.linspace(0, 8, width) @ rng.normal(size=(width, width))
        case "bfloat16":
            rows = (
                torch.from_numpy(rng.normal(size=(count, 3)) @ rng.normal(size=(3, width))).bfloat16().double().numpy()
            )
        case "equal angles":
            rows = np.eye(count) + 0.3
        case "extreme":
            rows = rows * 10.0 ** rng.integers(-30, 36, size=(count, 1))
    quality = draw(st.sampled_from([rng.random(count), np.ones(count), rng.integers(1, 4, size=count) / 4]))
    if draw(st.booleans()):  # differences of one last bit count too
        quality = np.nextafter(quality.astype(np.float32), np.float32(2) * rng.integers(0, 2, size=count))
    return torch.from_numpy(rows).float()[None], torch.from_numpy(np.asarray(quality)).float()[None]


@settings(max_examples=150)
@given(images_of_any_kind(), st.data())
def test_both_ways_are_the_greedy_map(case: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    """The two ways choose the same tokens in the same order, which is that of a float64 oracle wherever it leads."""
    features, quality = case
    keep = data.draw(st.integers(1, quality.shape[1]))
    order = whole(features, quality, keep)
    assert torch.equal(order, greedy_map_lazy(features, quality, keep))
    assert torch.equal(order, batched(features, quality, keep))
    assert len(set(order[0].tolist())) == keep
    rows, q = features[0].double().numpy(), quality[0].double().numpy()
    assert oracle.follow_greedy(rows, q, order[0].tolist()) >= 1


def test_the_two_ways_agree_past_the_rank() -> None:
    """A size at which float32 chose different tokens: 128 of 576 in 64 dimensions."""
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        features, quality = torch.randn(1, 576, 64, generator=draw), torch.rand(1, 576, generator=draw)
        order = greedy_map_lazy(features, quality, 128)
        assert torch.equal(order, whole(features, quality, 128))
        later = [token for token in quality[0].argsort(descending=True).tolist() if token not in order[0, :64].tolist()]
        assert order[0, 64:].tolist() == later[:64], "the rank is used up: by quality"


@each_way
def test_past_the_rank_the_last_bit_of_a_quality_counts(way: str) -> None:
    half = np.float32(0.5)
    quality = np.array([half, np.nextafter(half, np.float32(1)), 1.0, half])
    assert our_order(np.ones((4, 2)), quality, 4, way) == [2, 1, 0, 3]


@each_way
@pytest.mark.parametrize("size", [1e-43, 1e-30, 1e-13, 1e30, 1e38])
def test_only_the_direction_of_features_counts(way: str, size: float) -> None:
    """Also where their squares underflow or overflow in float32; only a vector of zeros has none."""
    rows = np.eye(3) * np.array([size, 1.0, size])[:, None]
    assert our_order(np.vstack([np.zeros((1, 3)), rows]), np.array([1.0, 0.3, 0.2, 0.9]), 4, way) == [3, 1, 2, 0]


def test_where_a_device_has_no_float64_the_cpu_selects(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of CUDA takes the whole matrix, to the same answer."""
    tokens, pruner = images(count=30), pruners.create("cdpruner")
    lazily = pruner.select(tokens, 14).indices
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(cdpruner, "greedy_map_lazy", None)
    assert torch.equal(pruner.select(tokens, 14).indices, lazily)


def test_what_is_not_read_is_not_computed() -> None:
    """With one token that outshines the others nothing else is looked at."""
    features, quality = torch.randn(50, 8), torch.full((50,), 0.1)
    quality[[7, 3]] = torch.tensor([1.0, 0.9])
    greedy = dpp.LazyGreedy(features, quality, 1)
    assert greedy.run().tolist() == [7]
    assert greedy.seen == dpp.BLOCK
    assert greedy.held <= dpp.ROWS


def test_many_images_are_chosen_for_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any number of images, also of several sizes and of one that has no token to lose."""
    monkeypatch.setattr(cdpruner, "BLOCK", 40)
    pruner, draw = pruners.create("cdpruner"), torch.Generator().manual_seed(0)
    several = [
        Choice(VisionTokens(*torch.randn(1, 1, n, 8, generator=draw), **shown), torch.rand(1, n, generator=draw))
        for n in (30, 30, 12, 50, 30, 14)
        for shown in [{name: torch.randn(1, n, 8, generator=draw) for name in ("image_embeds", "text_embeds")}]
    ]
    for number in range(1, len(several) + 1):
        found = pruner.select_each(several[:number], 12)
        for one, chosen in zip(several, found, strict=False):
            assert torch.equal(chosen.indices, pruner.select(one.tokens, 12, one.sensitivity).indices)
