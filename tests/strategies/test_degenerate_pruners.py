"""Equal tokens, tokens of zeros and equal scores, where every tie goes to the lower index: against the float64 oracles.

Vectors lie along axes and values are multiples of 1/64, so that float32 computes them exactly and ties are ties.
"""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import strategy_oracles as oracle
import test_coverage
import test_dart
import test_merging
import torch
from hypothesis import given, settings
from torch import Tensor

from qapbench import VisionTokens, pruners

few = settings(max_examples=50)
seeds, keeps = st.integers(0, 2**32 - 1), st.floats(0, 1)


def along_axes(draw: torch.Generator, count: int, width: int = 4, kinds: int = 3) -> Tensor:
    """Vectors [1, count, width] of few kinds: a power of two along an axis, forwards or backwards, or zero."""
    axis = torch.eye(width)[torch.randint(0, width, (kinds,), generator=draw)]
    size = torch.tensor([-2.0, -1.0, 0.0, 1.0, 1.0, 2.0, 4.0])[torch.randint(0, 7, (kinds,), generator=draw)]
    return (axis * size.unsqueeze(1))[torch.randint(0, kinds, (count,), generator=draw)][None]


def of_few_values(draw: torch.Generator, count: int) -> Tensor:
    """Values [1, count] among 0, 1/64, 2/64 and 4/64."""
    return torch.tensor([0.0, 1.0, 2.0, 4.0])[torch.randint(0, 4, (count,), generator=draw)][None] / 64


def degenerate(seed: int, grid: tuple[int, int]) -> VisionTokens:
    """One image with every field that the pruners below read."""
    draw, count = torch.Generator().manual_seed(seed), grid[0] * grid[1]
    return VisionTokens(
        projected=along_axes(draw, count),
        patches=along_axes(draw, count),
        keys=along_axes(draw, count).repeat(1, 1, 3),
        heads=3,
        cls_attention=of_few_values(draw, count),
        shallow_cls_attention=of_few_values(draw, count),
        prompt_embeds=along_axes(draw, 5),
        rotated_keys=along_axes(draw, count),
        text_keys=along_axes(draw, 5),
        final_states=along_axes(draw, count),
        text_states=along_axes(draw, 5),
        grid=grid,
    )


def budget(count: int, share: float) -> int:
    """A budget below all tokens."""
    return 1 + int(share * (count - 2))


@few
@given(seeds, st.integers(2, 24), keeps, st.booleans())
def test_coverage_of_the_image(seed: int, count: int, share: float, add: bool) -> None:
    tokens, keep = degenerate(seed, (1, count)), budget(count, share)
    got = pruners.create("scope", combine="add" if add else "multi").select(tokens, keep).indices
    weight = 3 * test_coverage.wide(tokens, "cls_attention", 0)
    patches = unit(test_coverage.wide(tokens, "patches", 0))
    chosen, _ = test_coverage.loop(
        patches @ patches.T, keep, lambda j, gain: gain + weight[j] if add else gain * weight[j]
    )
    assert got[0].tolist() == sorted(chosen)


@few
@given(seeds, st.integers(2, 30), keeps, st.integers(1, 5), st.integers(0, 6))
def test_pivots(seed: int, count: int, share: float, first: int, text: int) -> None:
    tokens, keep = degenerate(seed, (1, count)), budget(count, share)
    got = pruners.create("dart", image_pivots=first, text_pivots=text).select(tokens, keep).indices
    keys, said, states, spoken = (tokens.require(name, "test")[0].double().numpy() for name in test_dart.FIELDS["dart"])
    own, _ = test_dart.best(np.abs(keys).sum(axis=1), min(first, keep))
    other, _ = test_dart.best(np.abs(said).sum(axis=1), min(text, len(said)))
    pivots = np.concatenate([unit(states)[own], unit(spoken)[other]])
    assert set(got[0].tolist()) == test_dart.turns(unit(states), pivots, own, keep)[0]


@few
@given(seeds, st.integers(1, 6), st.integers(2, 6), st.integers(1, 4), keeps)
def test_windows_and_merging(seed: int, height: int, width: int, side: int, share: float) -> None:
    tokens, keep = degenerate(seed, (height, width)), budget(height * width, share)
    got = pruners.create("vscan", window=side).select(tokens, keep)
    kept, values, _ = literally(test_merging.vscan, tokens, tokens.require("cls_attention", "test")[0], keep, side)
    assert got.indices[0].tolist() == kept
    assert got.updated is not None
    np.testing.assert_allclose(got.updated[0].numpy(), values, rtol=1e-6, atol=1e-6)


@few
@given(seeds, st.integers(2, 30), keeps)
def test_tome_in_one_step(seed: int, count: int, share: float) -> None:
    tokens, keep = degenerate(seed, (1, count)), count - 1 - int(share * (count // 2 - 1))
    got = pruners.create("tome").select(tokens, keep)
    wanted, _ = literally(test_merging.tome, tokens, torch.ones(count), keep)
    assert got.indices[0].tolist() == sorted(wanted)
    assert got.updated is not None
    values = np.array([wanted[place][0] for place in sorted(wanted)])
    np.testing.assert_allclose(got.updated[0].numpy(), values, rtol=1e-6, atol=1e-6)


def unit(vectors: oracle.Array) -> oracle.Array:
    """Vectors of length one; zeros stay."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(length == 0, 1, length)


def literally(method: Any, tokens: VisionTokens, score: Tensor, *budget: int) -> Any:
    """What an oracle of `test_merging` answers, with zeros that stay zeros when they are normalised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "unit", unit)
        return method(tokens, 0, score.double().numpy(), *budget)


@pytest.mark.parametrize("length", [0.0, 1.0])
@pytest.mark.parametrize("keep", [1, 5, 16, 24, 63])
@pytest.mark.parametrize("method", ["scope", "mmtok", "pact", "dart", "dart_projected", "attention"])
def test_tokens_without_a_difference_are_kept_from_the_front(method: str, keep: int, length: float) -> None:
    count = 64
    alike = torch.zeros(1, count, 4)
    alike[..., 0] = length
    fields: dict[str, Any] = dict.fromkeys(("patches", "keys", "rotated_keys", "final_states"), alike)
    fields |= dict.fromkeys(("prompt_embeds", "text_keys", "text_states"), alike[:, :3])
    fields |= dict.fromkeys(("cls_attention", "context_attention"), torch.full((1, count), 1 / 64))
    chosen = pruners.create(method).select(VisionTokens(alike, **fields), keep)
    assert chosen.indices[0].tolist() == list(range(keep))
    if chosen.updated is not None:
        torch.testing.assert_close(chosen.updated, alike[:, :keep])


def test_tome_merges_equal_tokens_from_the_front() -> None:
    """Those at even places, the first ones first, into the first of those at odd places."""
    alike = torch.ones(1, 10, 4)
    got = pruners.create("tome").select(VisionTokens(alike, keys=alike), 7)
    assert got.indices.tolist() == [[1, 3, 5, 6, 7, 8, 9]]
    assert got.made is not None
    assert got.made.tolist() == [[True] + [False] * 6]


def test_holov_deals_equal_runs_as_much_and_earlier_ones_the_rest() -> None:
    tokens = VisionTokens(torch.ones(1, 64, 4), cls_attention=torch.full((1, 64), 1 / 64))
    kept = pruners.create("holov").select(tokens, 24).indices[0].tolist()
    assert kept == [4 * run + place for run in range(16) for place in range(2 if run < 8 else 1)]
