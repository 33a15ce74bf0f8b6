"""VisPruner against plain lists."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import strategy_oracles as oracle
import torch
from hypothesis import assume, given

from qapbench import VisionTokens, pruners


def images(seed: int, batch: int, count: int) -> VisionTokens:
    draw = torch.Generator().manual_seed(seed)
    return VisionTokens(
        projected=torch.randn(batch, count, 8, generator=draw),
        patches=torch.randn(batch, count, 6, generator=draw),
        cls_attention=torch.rand(batch, count, generator=draw),
    )


def loop(score: oracle.Array, patches: oracle.Array, keep: int, important: int) -> tuple[list[int], float]:
    """One image: what is kept, and the smallest lead of any comparison that decided."""
    unit = oracle.unit(patches)
    ranked = sorted(range(len(score)), key=lambda token: -score[token])
    lead = float(np.diff(np.sort(score)).min())
    first, left = ranked[:important], ranked[important:]
    if important == keep:
        return sorted(first), lead
    while len(left) > keep - important:
        even, odd = left[::2], left[1::2]
        likeness = {token: max(float(unit[token] @ unit[other]) for other in odd) for token in even}
        by_likeness = sorted(even, key=lambda token: -likeness[token])
        values = [likeness[token] for token in by_likeness]
        lead = min([lead, *(a - b for a, b in itertools.pairwise(values))])
        gone = min(8, len(left) - (keep - important), len(even))
        left = by_likeness[gone:] + odd
    return sorted(first + left), lead


@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.booleans(), st.data())
def test_matches_a_plain_loop(seed: int, count: int, fused: bool, data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 2), label="batch")
    keep = data.draw(st.integers(1, count - 1), label="keep")
    share = data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]), label="share")
    tokens = images(seed, batch, count)
    score = oracle.min_max(tokens.require("cls_attention", "test").double().numpy())
    sensitivity = tokens.projected.norm(dim=-1) if fused else None
    if sensitivity is not None:
        score = 0.7 * score + 0.3 * oracle.min_max(sensitivity.double().numpy())
    selection = pruners.create("vispruner", important=share).select(tokens, keep, sensitivity)
    assert selection.merged is None
    for image in range(batch):
        patches = tokens.require("patches", "test")[image].double().numpy()
        kept, lead = loop(score[image], patches, keep, int(keep * share))
        assume(lead > 1e-6)
        assert selection.indices[image].tolist() == kept


def test_only_important_is_attention() -> None:
    tokens = images(3, 2, 40)
    both = [pruners.create("vispruner", important=1.0), pruners.create("attention")]
    one, other = (pruner.select(tokens, 12).indices for pruner in both)
    assert torch.equal(one, other)


def test_copies_go() -> None:
    """Eight directions, each twice and side by side in the order of attention: one round leaves one of each."""
    patches = torch.eye(8).repeat_interleave(2, dim=0)[None]
    attention = torch.arange(16, 0, -1.0)[None]
    tokens = VisionTokens(torch.zeros(1, 16, 2), patches=patches, cls_attention=attention)
    indices = pruners.create("vispruner", important=0.0).select(tokens, 8).indices[0]
    assert (indices // 2).tolist() == list(range(8))


@pytest.mark.parametrize("keep", range(1, 25))
def test_every_budget(keep: int) -> None:
    """Odd rests, and rounds that would remove more than a side holds: where the released code fails."""
    indices = pruners.create("vispruner").select(images(4, 2, 25), keep).indices
    assert all(len(set(row)) == keep for row in indices.tolist())


def test_ties_keep_the_more_attended() -> None:
    attention = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    tokens = VisionTokens(torch.zeros(1, 6, 2), patches=torch.ones(1, 6, 3), cls_attention=attention)
    # One important (0); of [1 2 3 4 5] the even places 1 3 5 compare with 2 4, all alike: 3 and 5 go, 1 stays.
    assert pruners.create("vispruner", important=0.25).select(tokens, 4).indices.tolist() == [[0, 1, 2, 4]]
