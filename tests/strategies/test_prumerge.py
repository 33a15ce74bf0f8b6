"""PruMerge and PruMerge+ against plain loops."""

import hypothesis.strategies as st
import numpy as np
import pytest
import strategy_oracles as oracle
import torch
from hypothesis import assume, given

from qapbench import Selection, VisionTokens, pruners


def images(seed: int, batch: int, count: int) -> VisionTokens:
    draw = torch.Generator().manual_seed(seed)
    return VisionTokens(
        projected=torch.randn(batch, count, 8, generator=draw),
        patches=torch.randn(batch, count, 6, generator=draw),
        last_cls_attention=torch.randn(batch, count, generator=draw).softmax(dim=-1),
        last_keys=torch.randn(batch, count, 10, generator=draw),
    )


def best(score: oracle.Array, count: int) -> tuple[list[int], float]:
    ranked = sorted(range(len(score)), key=lambda token: (-score[token], token))
    return sorted(ranked[:count]), float(score[ranked[count - 1]] - score[ranked[count]])


def merge(
    centres: list[int], attention: oracle.Array, keys: oracle.Array, patches: oracle.Array, neighbours: int
) -> tuple[oracle.Array, oracle.Array, float]:
    """One image: centres with what they absorb, the sum of the rest, and the lead of the last neighbour taken."""
    unit, lead = oracle.unit(keys), np.inf
    updated = []
    for centre in centres:
        others = [token for token in range(len(attention)) if token != centre]
        others.sort(key=lambda token: -float(unit[token] @ unit[centre]))
        if neighbours < len(others):
            last, after = others[neighbours - 1], others[neighbours]
            lead = min(lead, float(unit[last] @ unit[centre] - unit[after] @ unit[centre]))
        token = patches[centre].copy()
        for other in others[:neighbours]:
            token += attention[other] * patches[other]
        updated.append(token)
    rest = np.zeros(patches.shape[1])
    for token in range(len(attention)):
        if token not in centres:
            rest += attention[token] * patches[token]
    return np.array(updated), rest, lead


def check(tokens: VisionTokens, selection: Selection, image: int, centres: list[int], neighbours: int) -> None:
    arrays = [tokens.require(n, "test")[image].double().numpy() for n in ("last_cls_attention", "last_keys", "patches")]
    updated, rest, lead = merge(centres, *arrays, neighbours)
    assume(lead > 1e-6)
    assert selection.indices[image].tolist() == centres
    assert selection.updated is not None
    assert (selection.space, selection.front) == ("patches", 0)
    np.testing.assert_allclose(selection.updated[image].numpy(), updated, rtol=1e-5, atol=1e-5)
    if selection.merged is not None:
        np.testing.assert_allclose(selection.merged[image, 0].numpy(), rest, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.booleans(), st.data())
def test_matches_a_plain_loop(seed: int, count: int, fused: bool, data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 2), label="batch")
    keep = data.draw(st.integers(1, count - 1), label="keep")
    neighbours = data.draw(st.sampled_from([1, 4, 32]), label="neighbours")
    tokens = images(seed, batch, count)
    score = oracle.min_max(tokens.require("last_cls_attention", "test").double().numpy())
    sensitivity = tokens.projected.norm(dim=-1) if fused else None
    if sensitivity is not None:
        score = 0.7 * score + 0.3 * oracle.min_max(sensitivity.double().numpy())
    selection = pruners.create("prumerge", neighbours=neighbours).select(tokens, keep, sensitivity)
    assert selection.budget == keep
    assert (selection.merged is None) == (keep == 1)
    for image in range(batch):
        centres, lead = best(score[image], max(keep - 1, 1))
        assume(lead > 1e-6)
        check(tokens, selection, image, centres, neighbours)


@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.data())
def test_plus_matches_a_plain_loop(seed: int, count: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, count - 1), label="keep")
    share = data.draw(st.sampled_from([0.0, 0.5, 0.75, 1.0]), label="share")
    tokens = images(seed, 1, count)
    score = tokens.require("last_cls_attention", "test").double().numpy()[0]
    wanted = max(keep - 1, 1)
    samples = min(round(wanted * share), wanted - 1)
    centres, lead = best(score, wanted - samples)
    assume(lead > 1e-6)
    left = [token for token in range(count) if token not in centres]
    centres += [left[place * len(left) // samples] for place in range(samples)]
    selection = pruners.create("prumerge_plus", spatial=share).select(tokens, keep)
    assert selection.budget == keep
    check(tokens, selection, 0, sorted(centres), 32)


def test_plus_without_samples_is_prumerge() -> None:
    tokens = images(5, 2, 50)
    one = pruners.create("prumerge_plus", spatial=0.0).select(tokens, 12)
    other = pruners.create("prumerge").select(tokens, 12)
    assert torch.equal(one.indices, other.indices)
    assert one.updated is not None
    assert other.updated is not None
    assert torch.equal(one.updated, other.updated)


@pytest.mark.parametrize("keep", [5, 33, 145])
def test_plus_reaches_everywhere(keep: int) -> None:
    """No stretch of the raster without a centre is longer than an even spread over the tokens left allows."""
    tokens = images(6, 1, 576)
    indices = pruners.create("prumerge_plus").select(tokens, keep).indices[0]
    samples = round((keep - 1) * 0.75)
    gap = int(torch.cat([indices, torch.tensor([576])]).diff().max())
    assert gap <= 576 // samples + (keep - samples) + 1
    assert indices[0] <= keep - samples


def test_one_token_absorbs_but_nothing_is_appended() -> None:
    selection = pruners.create("prumerge").select(images(7, 2, 20), 1)
    assert selection.merged is None
    assert selection.updated is not None
    assert selection.updated.shape == (2, 1, 6)
