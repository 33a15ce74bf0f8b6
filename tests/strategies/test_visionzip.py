"""VisionZip against a plain loop."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
import strategy_oracles as oracle
import torch
from hypothesis import assume, given

from qapbench import Selection, VisionTokens, pruners


def images(seed: int, batch: int, count: int, heads: int) -> VisionTokens:
    draw = torch.Generator().manual_seed(seed)
    return VisionTokens(
        projected=torch.randn(batch, count, 8, generator=draw),
        patches=torch.randn(batch, count, 6, generator=draw),
        cls_attention=torch.rand(batch, count, generator=draw),
        keys=torch.randn(batch, count, heads * 5, generator=draw),
        heads=heads,
        cls_token=torch.randn(batch, 6, generator=draw),
    )


def check(tokens: VisionTokens, selection: Selection, scores: np.ndarray, dominant: int, contextual: int) -> None:
    assert tokens.keys is not None
    assert tokens.patches is not None
    assert tokens.cls_token is not None
    with_cls = selection.front
    assert selection.indices.shape[1] == dominant
    assert selection.space == "patches"
    for image in range(tokens.batch):
        arrays = [tokens.keys[image].double().numpy(), tokens.patches[image].double().numpy()]
        kept, merged, lead = oracle.visionzip(scores[image], arrays[0], tokens.heads, arrays[1], dominant, contextual)
        assume(lead > 1e-5)
        assert selection.indices[image].tolist() == kept
        if selection.merged is None:
            assert with_cls == contextual == 0
            continue
        assert selection.merged.shape[1] == with_cls + contextual
        if with_cls:
            assert torch.equal(selection.merged[image, 0], tokens.cls_token[image])
        np.testing.assert_allclose(selection.merged[image, with_cls:].numpy(), merged, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4]), st.integers(3, 40), st.data())
def test_matches_a_plain_loop(seed: int, heads: int, count: int, data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 2), label="batch")
    keep = data.draw(st.integers(1, count - 1), label="keep")
    share = data.draw(st.sampled_from([0.0, 5 / 32, 0.25, 0.5, 1.0]), label="share")
    tokens = images(seed, batch, count, heads)
    with_cls = int(keep > 1)
    contextual = min(round(keep * share), keep - with_cls - 1)
    selection = pruners.create("visionzip", contextual=share).select(tokens, keep)
    assert tokens.cls_attention is not None
    attention = tokens.cls_attention.double().numpy()
    check(tokens, selection, attention, keep - with_cls - contextual, contextual)


@given(st.integers(0, 2**32 - 1))
def test_sensitivity_moves_the_dominant_tokens(seed: int) -> None:
    tokens = images(seed, 1, 30, 2)
    sensitivity = tokens.projected.norm(dim=-1)
    assert tokens.cls_attention is not None
    fused = 0.7 * oracle.min_max(tokens.cls_attention.double().numpy())
    fused = fused + 0.3 * oracle.min_max(sensitivity.double().numpy())
    check(tokens, pruners.create("visionzip").select(tokens, 16, sensitivity), fused, 13, 2)


@pytest.mark.parametrize("keep, contextual", [(64, 10), (128, 20), (192, 30)])
def test_the_released_splits(keep: int, contextual: int) -> None:
    """54 + 10, 108 + 20, 162 + 30; CLS is one of the first number."""
    selection = pruners.create("visionzip").select(images(0, 1, 300, 2), keep)
    assert selection.front == 1
    assert selection.merged is not None
    assert selection.merged.shape[1] == 1 + contextual
    assert selection.indices.shape[1] == keep - contextual - 1


def test_without_a_cls_token_its_place_goes_to_a_patch() -> None:
    tokens = dataclasses.replace(images(0, 2, 30, 2), cls_token=None)
    selection = pruners.create("visionzip").select(tokens, 16)
    assert selection.front == 0
    assert selection.indices.shape[1] == 14
    assert selection.budget == 16
