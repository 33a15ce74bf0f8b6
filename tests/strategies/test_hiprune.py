"""HiPrune against plain loops over rows and columns."""

import hypothesis.strategies as st
import pytest
import strategy_oracles as oracle
import torch
from hypothesis import assume, given

from qapbench import VisionTokens, pruners


def images(seed: int, batch: int, grid: tuple[int, int]) -> VisionTokens:
    draw = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]
    return VisionTokens(
        projected=torch.randn(batch, count, 8, generator=draw),
        attention_received=torch.rand(batch, count, generator=draw),
        middle_attention_received=torch.rand(batch, count, generator=draw),
        grid=grid,
    )


def ranked(values: oracle.Array) -> list[int]:
    return sorted(range(len(values)), key=lambda token: (-values[token], token))


def loop(score: oracle.Array, middle: oracle.Array, grid: tuple[int, int], anchors: int, keep: int) -> list[int]:
    height, width = grid
    kept = set()
    for anchor in ranked(middle)[:anchors]:
        row, column = divmod(anchor, width)
        for down, right in ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)):
            if 0 <= row + down < height and 0 <= column + right < width:
                kept.add((row + down) * width + column + right)
    registers = [token for token in ranked(score) if token not in kept]
    return sorted([*kept, *registers[: keep - len(kept)]])


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(2, 9), st.booleans(), st.data())
def test_matches_a_plain_loop(seed: int, height: int, width: int, fused: bool, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, height * width - 1), label="keep")
    alpha = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]), label="alpha")
    tokens = images(seed, 2, (height, width))
    score = oracle.min_max(tokens.require("attention_received", "test").double().numpy())
    sensitivity = tokens.projected.norm(dim=-1) if fused else None
    if sensitivity is not None:
        score = 0.7 * score + 0.3 * oracle.min_max(sensitivity.double().numpy())
    middle = tokens.require("middle_attention_received", "test").double().numpy()
    anchors = min(round(keep * alpha / 5), keep // 5)
    selection = pruners.create("hiprune", alpha=alpha).select(tokens, keep, sensitivity)
    assert selection.merged is None
    for image in range(2):
        order = score[image][ranked(score[image])]
        assume((order[:-1] - order[1:]).min() > 1e-6)
        assert selection.indices[image].tolist() == loop(score[image], middle[image], (height, width), anchors, keep)


@pytest.mark.parametrize(
    "anchor, kept",
    [(12, [7, 11, 12, 13, 17]), (0, [0, 1, 5]), (4, [3, 4, 9]), (5, [0, 5, 6, 10]), (24, [19, 23, 24])],
)
def test_buffers_stay_inside_the_grid(anchor: int, kept: list[int]) -> None:
    """5 x 5, one anchor in the middle, at corners and at an edge: where the released code wraps around."""
    deep = torch.linspace(1, 0, 25)[None]
    middle = torch.zeros(1, 25)
    middle[0, anchor] = 1
    tokens = VisionTokens(torch.zeros(1, 25, 2), attention_received=deep, middle_attention_received=middle, grid=(5, 5))
    indices = pruners.create("hiprune", alpha=1.0).select(tokens, 5).indices[0].tolist()
    registers = [token for token in range(25) if token not in kept]
    assert indices == sorted(kept + registers[: 5 - len(kept)])


@pytest.mark.parametrize("keep, anchors", [(24, 0), (26, 1), (64, 1), (128, 3), (192, 4)])
def test_share_of_the_released_budgets(keep: int, anchors: int) -> None:
    tokens = images(0, 1, (24, 24))
    middle = torch.zeros(1, 576)
    places = torch.tensor([25 * 24 // 2 + 5, 100, 227, 447])
    middle[0, places] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    deep = torch.ones(1, 576)
    around = torch.cat([places, places - 1, places + 1, places - 24, places + 24])
    deep[0, around] = 0  # so that only anchors can bring them in
    tokens = VisionTokens(tokens.projected, attention_received=deep, middle_attention_received=middle, grid=(24, 24))
    indices = pruners.create("hiprune").select(tokens, keep).indices[0]
    assert int(torch.isin(indices, around).sum()) == 5 * anchors
