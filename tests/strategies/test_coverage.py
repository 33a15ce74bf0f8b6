"""SCOPE and MMTok against greedy coverage taken literally, in float64."""

from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
import strategy_oracles as oracle
import torch
from hypothesis import assume, given

from qapbench import VisionTokens, pruners
from qapbench.strategies.pruners.coverage import greedy_coverage
from qapbench.strategies.pruners.scale import on_the_scale_of

LEAD = 1e-5  # float32 may decide otherwise below it


def loop(rows: oracle.Array, keep: int, worth: Callable[[int, float], float]) -> tuple[list[int], float]:
    """Tokens in the order of choice, and the smallest relative lead over a runner-up.

    Args:
        rows: [M, N] how well each token covers each row.
        keep: number of tokens.
        worth: what a token and its gain are worth.
    """
    covered, chosen, lead = np.zeros(len(rows)), [], np.inf
    for _ in range(keep):
        values = {}
        for token in range(rows.shape[1]):
            if token not in chosen:
                gain = sum(max(0.0, row[token] - c) for row, c in zip(rows, covered, strict=True))
                values[token] = worth(token, gain)
        best = max(values, key=lambda token: (values[token], -token))
        others = [value for token, value in values.items() if token != best]
        if others:
            lead = min(lead, (values[best] - max(others)) / max(values[best], 1e-30))
        chosen.append(best)
        covered = np.maximum(covered, rows[:, best])
    return chosen, lead


def softmax(logits: oracle.Array) -> oracle.Array:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def images(seed: int, count: int, batch: int = 1) -> VisionTokens:
    draw = torch.Generator().manual_seed(seed)
    return VisionTokens(
        projected=torch.randn(batch, count, 12, generator=draw),
        patches=torch.randn(batch, count, 9, generator=draw),
        cls_attention=(2 * torch.randn(batch, count, generator=draw)).softmax(dim=-1),
        prompt_embeds=torch.randn(batch, 4, 12, generator=draw),
        heads=3,
    )


def wide(tokens: VisionTokens, name: str, image: int) -> oracle.Array:
    return tokens.require(name, "test")[image].double().numpy()


@given(
    st.integers(0, 2**32 - 1), st.integers(2, 24), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.booleans(), st.booleans()
)
def test_scope(seed: int, count: int, alpha: float, add: bool, fused: bool) -> None:
    """Its source: scope/clip_encoder.py of kinredon/SCOPE at 6bf7306. The attention counts with its own values."""
    tokens, keep = images(seed, count, batch=2), max(1, count // 2)
    sensitivity = tokens.projected.norm(dim=-1) if fused else None
    pruner = pruners.create("scope", alpha=alpha, combine="add" if add else "multi")
    got = pruner.select(tokens, keep, sensitivity).indices
    for image in range(2):
        attention = wide(tokens, "cls_attention", image)
        if sensitivity is not None:
            both = oracle.min_max(np.stack([attention, sensitivity[image].double().numpy()]))
            attention = attention + (0.7 * both[0] + 0.3 * both[1] - both[0]) * (attention.max() - attention.min())
        weight = (3 * attention) ** alpha
        patches = oracle.unit(wide(tokens, "patches", image))
        chosen, lead = loop(
            patches @ patches.T, keep, lambda token, gain, w=weight: gain + w[token] if add else gain * w[token]
        )
        if lead > LEAD:
            assert got[image].tolist() == sorted(chosen)


@given(st.integers(0, 2**32 - 1), st.integers(2, 24), st.sampled_from([0.0, 0.5, 2.0]), st.booleans())
def test_mmtok(seed: int, count: int, alpha: float, fused: bool) -> None:
    """Its source: mmtok/core/semantic_selector.py of Ironieser/MMTok at d1522cd."""
    tokens, keep = images(seed, count, batch=2), max(1, count // 2)
    sensitivity = tokens.projected.norm(dim=-1) if fused else None
    pruner = pruners.create("mmtok", alpha=alpha, text_temperature=0.1)
    got = pruner.select(tokens, keep, sensitivity).indices
    score = np.ones((2, count))
    if sensitivity is not None:
        score = 0.7 + 0.3 * oracle.min_max(sensitivity.double().numpy())
    for image in range(2):
        words, visual, patches = (
            oracle.unit(wide(tokens, name, image)) for name in ("prompt_embeds", "projected", "patches")
        )
        rows = np.concatenate([softmax(words @ visual.T / 0.1) / 4, alpha * softmax(patches @ patches.T / 0.2) / count])
        chosen, lead = loop(rows, keep, lambda token, gain, s=score[image]: gain * s[token])
        if lead > LEAD:
            assert got[image].tolist() == sorted(chosen)


def test_what_is_covered_adds_nothing() -> None:
    """Three pairs of equal columns: one of each pair first, the lower, and then what is left by index."""
    rows = torch.eye(3).repeat_interleave(2, dim=1)[None] * torch.tensor([1.0, 1.0, 3.0, 3.0, 2.0, 2.0])
    assert greedy_coverage(rows, 6)[0].tolist() == [2, 4, 0, 1, 3, 5]


def test_negative_values_cover_nothing() -> None:
    rows = torch.tensor([[[-1.0, 0.5, 0.2], [-1.0, -9.0, 0.2]]])
    assert greedy_coverage(rows, 3)[0].tolist() == [1, 2, 0]


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-4, 1.0, 300.0]))
def test_scores_return_to_the_scale_of_their_relevance(seed: int, size: float) -> None:
    relevance = torch.rand(2, 9, generator=torch.Generator().manual_seed(seed)) * size
    assume(bool((relevance.amax(dim=1) > relevance.amin(dim=1)).all()))
    tokens = VisionTokens(torch.ones(2, 9, 1), cls_attention=relevance)
    plain = pruners.create("attention").scores(tokens, None, None)
    assert torch.equal(on_the_scale_of(relevance, plain), relevance), "to the bit"
    high = relevance.amax(dim=-1, keepdim=True)
    best = on_the_scale_of(relevance, torch.ones(2, 9))
    torch.testing.assert_close(best, high.expand(2, 9), rtol=1e-5, atol=1e-6)  # 1e-6 as in the normalisation
    assert (on_the_scale_of(relevance, torch.zeros(2, 9)) >= 0).all()


@pytest.mark.parametrize("method", ["scope", "mmtok"])
def test_the_question_and_the_attention_count(method: str) -> None:
    one, other = images(0, 30), images(1, 30)
    field = {"scope": "cls_attention", "mmtok": "prompt_embeds"}[method]
    fields = {name: getattr(one, name) for name in ("projected", "patches", "cls_attention", "prompt_embeds")}
    changed = VisionTokens(**{**fields, field: getattr(other, field)})
    pruner = pruners.create(method)
    assert not torch.equal(pruner.select(one, 8).indices, pruner.select(changed, 8).indices)
