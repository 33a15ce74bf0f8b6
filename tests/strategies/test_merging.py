"""ToMe, VScan and the floor avgpool against their rules taken literally, in float64."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import strategy_oracles as oracle
import torch
from hypothesis import given

from qapbench import VisionTokens, pruners
from qapbench.strategies.pruners.avgpool import cells
from qapbench.strategies.pruners.vscan import spread, windows

LEAD = 1e-5  # float32 may decide otherwise below it


def images(seed: int, grid: tuple[int, int], batch: int = 2) -> VisionTokens:
    draw, count = torch.Generator().manual_seed(seed), grid[0] * grid[1]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=draw)

    return VisionTokens(
        projected=normal(count, 10),
        keys=normal(count, 12),
        heads=3,
        cls_attention=(2 * normal(count)).softmax(dim=-1),
        shallow_cls_attention=(2 * normal(count)).softmax(dim=-1),
        grid=grid,
    )


def fused(sensitivity: torch.Tensor | None, image: int, relevance: oracle.Array) -> oracle.Array:
    """The scores of one image with the default fusion."""
    if sensitivity is None:
        return relevance
    return 0.7 * relevance + 0.3 * oracle.min_max(sensitivity[image].double().numpy()[None])[0]


def tome(tokens: VisionTokens, image: int, score: oracle.Array, keep: int) -> tuple[dict[int, Any], float]:
    """Place -> (value, size) of each token that is left, and the smallest lead of any decision.

    Its source: tome/merge.py of facebookresearch/ToMe at af95e4b.
    """
    keys = tokens.require("keys", "test")[image].double().numpy().reshape(tokens.count, 3, -1).mean(axis=1)
    values = tokens.projected[image].double().numpy()
    left = [(place, values[place], keys[place], 1, score[place]) for place in range(tokens.count)]
    lead = np.inf
    while len(left) > keep:
        count = min(len(left) // 2, len(left) - keep)
        even, odd = left[::2], left[1::2]
        edges = []
        for index, (_, _, key, _, worth) in enumerate(even):
            cosines = [float(oracle.unit(key) @ oracle.unit(other[2])) for other in odd]
            best = int(np.argmax(cosines))
            ranked = sorted(cosines)
            lead = min(lead, ranked[-1] - ranked[-2]) if len(ranked) > 1 else lead
            edges.append(((1 - cosines[best]) * worth, index, best))
        edges.sort()
        gaps = np.diff([edge[0] for edge in edges])
        lead = min(lead, gaps.min()) if len(gaps) else lead
        for _, index, best in edges[:count]:
            _, value, key, size, worth = even[index]
            place, other, own, held, score_of = odd[best]
            total = held + size
            mean = (other * held + value * size) / total, (own * held + key * size) / total
            odd[best] = (place, *mean, total, max(score_of, worth))
        left = [even[index] for _, index, _ in edges[count:]] + odd
    return {place: (value, size) for place, value, _, size, _ in left}, lead


@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.booleans(), st.data())
def test_tome(seed: int, count: int, sensitive: bool, data: Any) -> None:
    keep = data.draw(st.integers(1, count - 1), label="keep")
    tokens = images(seed, (1, count))
    sensitivity = tokens.projected.norm(dim=-1) if sensitive else None
    got = pruners.create("tome").select(tokens, keep, sensitivity)
    assert got.updated is not None
    assert got.made is not None
    for image in range(2):
        wanted, lead = tome(tokens, image, fused(sensitivity, image, np.ones(count)), keep)
        if lead > LEAD:
            assert got.indices[image].tolist() == sorted(wanted)
            assert got.made[image].tolist() == [wanted[place][1] > 1 for place in sorted(wanted)]
            values = np.array([wanted[place][0] for place in sorted(wanted)])
            np.testing.assert_allclose(got.updated[image].numpy(), values, rtol=1e-5, atol=1e-5)


def test_tokens_that_did_not_merge_are_as_they_were() -> None:
    tokens = images(3, (6, 6))
    got = pruners.create("tome").select(tokens, 25)
    assert got.updated is not None
    assert got.made is not None
    same = tokens.projected.gather(1, got.indices.unsqueeze(-1).expand_as(got.updated)) == got.updated
    assert torch.equal(same.all(dim=-1), ~got.made)


def vscan(tokens: VisionTokens, image: int, score: oracle.Array, keep: int, side: int) -> tuple[Any, Any, float]:
    """Kept tokens, their values after merging, and the smallest lead of any decision.

    Its source: VScan/qwen/model/qwen2_5_vl_utils.py and VScan/llava/model/llava_arch.py of Tencent/SelfEvolvingAgent at
    a82450e. Details are found by walking all tokens by falling attention.
    """
    assert tokens.grid is not None
    (height, width), count = tokens.grid, tokens.count
    shallow, projected = (
        tokens.require(name, "test")[image].double().numpy() for name in ("shallow_cls_attention", "projected")
    )
    down, across = max(height // side, 1), max(width // side, 1)
    window = [
        min(token // width // side, down - 1) * across + min(token % width // side, across - 1)
        for token in range(count)
    ]
    local, share = keep // 2, -(-(keep // 2) // (down * across))
    sizes = [window.count(one) for one in range(down * across)]
    while sum(min(size, share) for size in sizes) < local:
        share += 1
    kept: list[int] = []
    walk = sorted(range(count), key=lambda token: (-shallow[token], token))
    for token in walk:
        if len(kept) < local and [window[other] for other in kept].count(window[token]) < share:
            kept.append(token)
    lead = min(np.diff(sorted(shallow)))
    rest = sorted((token for token in range(count) if token not in kept), key=lambda token: (-score[token], token))
    lead = min(lead, min(np.diff(sorted(score))))
    kept = sorted(kept + rest[: keep - local])
    unit = oracle.unit(projected)
    groups: dict[int, list[int]] = {token: [token] for token in kept}
    for token in range(count):
        if token not in groups:
            cosines = [float(unit[token] @ unit[other]) for other in kept]
            ranked = sorted(cosines)
            lead = min(lead, ranked[-1] - ranked[-2]) if len(ranked) > 1 else lead
            groups[kept[int(np.argmax(cosines))]].append(token)
    return kept, np.array([projected[groups[token]].mean(axis=0) for token in kept]), lead


@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.integers(2, 7), st.integers(1, 4), st.booleans(), st.data())
def test_vscan(seed: int, height: int, width: int, side: int, sensitive: bool, data: Any) -> None:
    keep = data.draw(st.integers(1, height * width - 1), label="keep")
    tokens = images(seed, (height, width))
    sensitivity = tokens.projected.norm(dim=-1) if sensitive else None
    got = pruners.create("vscan", window=side).select(tokens, keep, sensitivity)
    assert got.updated is not None
    for image in range(2):
        attention = oracle.min_max(tokens.require("cls_attention", "test")[image].double().numpy()[None])[0]
        kept, values, lead = vscan(tokens, image, fused(sensitivity, image, attention), keep, side)
        if lead > 1e-6:
            assert got.indices[image].tolist() == kept
            np.testing.assert_allclose(got.updated[image].numpy(), values, rtol=1e-5, atol=1e-5)


def test_windows_and_what_they_may_give() -> None:
    """A grid of 5 x 7 in windows of 2: two by three of them, the last ones longer by what is left over."""
    of = windows((5, 7), 2).view(5, 7)
    assert of[:, 0].tolist() == [0, 0, 3, 3, 3]
    assert of[0].tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert windows((2, 3), 4).tolist() == [0] * 6
    scores = torch.tensor([[9.0, 8.0, 7.0, 1.0, 0.5, 0.1]])
    assert spread(scores, torch.tensor([0, 0, 0, 0, 1, 1]), 4).tolist() == [[0, 1, 4, 5]]
    assert spread(scores, torch.tensor([0, 0, 0, 0, 0, 1]), 5).tolist() == [[0, 1, 2, 3, 5]]


@pytest.mark.parametrize("grid", [(24, 24), (1, 30), (30, 1), (5, 9), (7, 3)])
def test_cells_cut_the_grid_evenly(grid: tuple[int, int]) -> None:
    count = grid[0] * grid[1]
    for keep in sorted({1, 2, 3, 5, 16, 29, count // 2, count - 1, count} & set(range(1, count + 1))):
        of = cells(grid, keep)
        sizes = torch.bincount(of, minlength=keep)
        assert (len(of), len(sizes)) == (count, keep)
        assert sizes.min() >= 1
        for cell in range(keep):
            rows, columns = ((of.view(grid) == cell).nonzero()).unbind(dim=1)
            box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert box == sizes[cell], "a cell is a rectangle"


def test_avgpool_of_a_square() -> None:
    """64 of 24 x 24: the mean over 3 x 3 each, at their middle."""
    tokens = images(1, (24, 24))
    got = pruners.create("avgpool").select(tokens, 64)
    assert got.updated is not None
    square = tokens.projected.unflatten(1, (8, 3, 8, 3)).mean(dim=(2, 4)).flatten(1, 2)
    torch.testing.assert_close(got.updated, square)
    middle = torch.arange(576).view(24, 24)[1::3, 1::3].flatten()
    assert torch.equal(got.indices, middle.expand(2, -1))
    assert got.made is not None
    assert got.made.all()


def test_a_sensitivity_weighs_the_mean() -> None:
    tokens = images(2, (4, 4), batch=1)
    sensitivity = torch.rand(1, 16, generator=torch.Generator().manual_seed(0))
    got = pruners.create("avgpool").select(tokens, 4, sensitivity)
    assert got.updated is not None
    score = fused(sensitivity, 0, np.ones(16))
    values, wanted = tokens.projected[0].double().numpy(), {}
    for cell in range(4):
        own = (cells((4, 4), 4) == cell).nonzero()[:, 0].tolist()
        wanted[max(own, key=lambda token: score[token])] = np.average(values[own], axis=0, weights=score[own])
    assert got.indices[0].tolist() == sorted(wanted)
    np.testing.assert_allclose(
        got.updated[0].numpy(), [wanted[place] for place in sorted(wanted)], rtol=1e-5, atol=1e-6
    )
