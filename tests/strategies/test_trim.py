"""TRIM against a plain loop."""

import hypothesis.strategies as st
import numpy as np
import pytest
import strategy_oracles as oracle
import torch
from hypothesis import assume, given

from qapbench import VisionTokens, pruners


def images(seed: int, batch: int, count: int, segments: int = 1) -> VisionTokens:
    draw = torch.Generator().manual_seed(seed)
    return VisionTokens(
        projected=torch.randn(batch, count, 8, generator=draw),
        patches=torch.randn(batch, count, 6, generator=draw),
        image_embeds=torch.randn(batch, count, 5, generator=draw),
        text_embeds=torch.randn(batch, segments, 5, generator=draw),
    )


def loop(score: oracle.Array, patches: oracle.Array, keep: int) -> tuple[list[int], oracle.Array | None, float]:
    """One image: kept patches, mean of the others, and the lead of the last one kept."""
    count = len(score)
    wanted = keep if keep == 1 else keep - 1
    ranked = sorted(range(count), key=lambda token: (-score[token], token))
    lead = score[ranked[wanted - 1]] - score[ranked[wanted]]
    if keep == 1:
        return ranked[:1], None, lead
    others = [patches[token] for token in range(count) if token not in ranked[:wanted]]
    return sorted(ranked[:wanted]), sum(others) / len(others), lead


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.booleans(), st.data())
def test_matches_a_plain_loop(seed: int, count: int, fused: bool, data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 2), label="batch")
    segments = data.draw(st.integers(1, 3), label="segments")
    keep = data.draw(st.integers(1, count - 1), label="keep")
    tokens = images(seed, batch, count, segments)
    image, text = (tokens.require(name, "test").double().numpy() for name in ("image_embeds", "text_embeds"))
    score = oracle.min_max(np.array([[-np.mean([row @ t for t in text[b]]) for row in image[b]] for b in range(batch)]))
    sensitivity = tokens.projected.norm(dim=-1) if fused else None
    if sensitivity is not None:
        score = 0.7 * score + 0.3 * oracle.min_max(sensitivity.double().numpy())
    selection = pruners.create("trim").select(tokens, keep, sensitivity)
    for index in range(batch):
        kept, mean, lead = loop(score[index], tokens.require("patches", "test")[index].double().numpy(), keep)
        assume(lead > 1e-5)
        assert selection.indices[index].tolist() == kept
        assert (mean is None) == (selection.merged is None)
        if selection.merged is not None:
            assert (selection.space, selection.front, selection.merged.shape[1]) == ("patches", 0, 1)
            np.testing.assert_allclose(selection.merged[index, 0].numpy(), mean, rtol=1e-5, atol=1e-5)


def test_one_token_is_the_best_patch() -> None:
    tokens = images(0, 2, 9)
    selection = pruners.create("trim").select(tokens, 1)
    assert selection.merged is None
    relevance = pruners.create("trim").relevance(tokens)
    assert relevance is not None
    assert torch.equal(selection.indices[:, 0], relevance.argmax(dim=-1))


@pytest.mark.parametrize("keep", [2, 5])
def test_positive_relevance_keeps_the_other_end(keep: int) -> None:
    tokens = images(1, 1, 12)
    relevance = pruners.create("trim").relevance(tokens)
    assert relevance is not None
    lowest = relevance[0].argsort()[: keep - 1].sort().values
    positive = pruners.create("trim", relevance_sign="positive")
    assert torch.equal(positive.select(tokens, keep).indices[0], lowest)


def test_lengths_count() -> None:
    """The dot product is raw: a patch twice as long is twice as relevant, or irrelevant."""
    tokens = images(2, 1, 6)
    double = VisionTokens(
        tokens.projected, image_embeds=2 * tokens.require("image_embeds", "test"), text_embeds=tokens.text_embeds
    )
    one, two = (pruners.create("trim").relevance(t) for t in (tokens, double))
    assert one is not None
    torch.testing.assert_close(two, 2 * one)


def test_peaked_relevance_keeps_its_order() -> None:
    """Dot products far apart, where a softmax underflows: the order below the first is still relevance's."""
    embeds = -torch.tensor([[[10.0], [500.0], [30.0], [20.0], [0.0], [40.0]]])
    flat = torch.zeros(1, 6, 2)
    tokens = VisionTokens(projected=flat, patches=flat, image_embeds=embeds, text_embeds=torch.ones(1, 1, 1))
    assert pruners.create("trim").select(tokens, 4).indices.tolist() == [[1, 2, 5]]
