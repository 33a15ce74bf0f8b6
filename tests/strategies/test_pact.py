"""PACT against its rule taken literally, in float64."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import strategy_oracles as oracle
import torch
from hypothesis import given

from qapbench import Selection, VisionTokens, pruners, top_k
from qapbench.strategies.pruners.pact import centres_at


def images(seed: int, count: int, groups: int = 5) -> VisionTokens:
    """One image whose keys lie around a few directions."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.randn(groups, 6, generator=draw)
    member = torch.randint(0, groups, (count,), generator=draw)
    keys = directions[member] + 0.4 * torch.randn(count, 6, generator=draw)
    return VisionTokens(
        projected=torch.randn(1, count, 8, generator=draw),
        rotated_keys=keys[None],
        context_attention=torch.randn(1, count, generator=draw).softmax(dim=-1),
    )


def peaks(distance: oracle.Array, cutoff: float) -> tuple[list[int], float]:
    """Centres by falling density, and how far the closest decision was from another one."""
    density = [sum(np.exp(-((d / 2) ** 2)) for d in row) for row in distance]
    order = sorted(range(len(distance)), key=lambda token: (-density[token], token))
    found: list[int] = []
    for token in order:
        if all(distance[token, centre] > cutoff for centre in found):
            found.append(token)
    lead = np.abs(distance[np.triu_indices(len(distance), 1)] - cutoff).min() if len(distance) > 1 else 1.0
    return found, min(lead, np.diff(sorted(density)).min() if len(distance) > 1 else 1.0)


def loop(tokens: VisionTokens, important: list[int], cutoff: float, recovery: float) -> tuple[dict[int, Any], float]:
    """Centre -> (mean, size) of its cluster, at a given cutoff, and the smallest lead of any decision.

    Its source: transformers/PACT/utils.py of orailix/PACT at cf9a0c9. There centres are found in rounds; what they lead
    to is what one pass by falling density leads to.
    """
    unit = oracle.unit(tokens.require("rotated_keys", "test")[0].double().numpy())
    hidden = tokens.projected[0].double().numpy()
    distance = np.maximum(1 - unit @ unit.T, 0)
    np.fill_diagonal(distance, 0)
    found, lead = peaks(distance[np.ix_(important, important)], cutoff)
    centres = [important[place] for place in found]
    groups: dict[int, list[int]] = {centre: [] for centre in centres}
    for token in range(len(unit)):
        away = sorted((distance[token, centre], centre) for centre in centres)
        nearest, centre = away[0]
        lead = min(lead, away[1][0] - nearest) if len(away) > 1 else lead
        if token not in important:
            lead = min(lead, abs(nearest - recovery * cutoff))
        if token in important or nearest <= recovery * cutoff:
            groups[centre].append(token)
    return {centre: (hidden[own].mean(axis=0), len(own)) for centre, own in groups.items()}, lead


@given(
    st.integers(0, 2**32 - 1),
    st.integers(4, 30),
    st.sampled_from([0.3, 0.55, 1.0]),
    st.sampled_from([0.05, 0.21, 0.8]),
    st.booleans(),
)
def test_a_cutoff_that_leads_to_the_budget(seed: int, count: int, important: float, cutoff: float, fused: bool) -> None:
    tokens = images(seed, count)
    sensitivity = tokens.projected.abs().mean(dim=-1) if fused else None
    attention = tokens.require("context_attention", "test")[0].double().numpy()
    score = oracle.min_max((attention * np.linalg.norm(tokens.projected[0].double().numpy(), axis=1))[None])[0]
    if sensitivity is not None:
        score = 0.7 * score + 0.3 * oracle.min_max(sensitivity.double().numpy())[0]
    ranked = sorted(range(count), key=lambda token: (-score[token], token))[: max(int(count * important), 1)]
    wanted, lead = loop(tokens, sorted(ranked), cutoff, 1.5)
    keep = len(wanted)
    if keep == count or lead < 1e-6 or np.diff(sorted(score)).min() < 1e-6:
        return
    pruner = pruners.create("pact", important=important, cutoff=cutoff)
    got = pruner.select(tokens, keep, sensitivity)
    assert got.updated is not None
    assert got.made is not None
    assert got.indices[0].tolist() == sorted(wanted)
    assert got.made[0].tolist() == [wanted[centre][1] > 1 for centre in sorted(wanted)]
    values = np.array([wanted[centre][0] for centre in sorted(wanted)])
    np.testing.assert_allclose(got.updated[0].numpy(), values, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.data())
def test_any_budget_has_a_cutoff(seed: int, count: int, data: Any) -> None:
    """It leads to `keep` centres or fewer; those that are added then are the farthest ones, one after another."""
    keep = data.draw(st.integers(1, count), label="keep")
    unit = oracle.unit(images(seed, count).require("rotated_keys", "test")[0].double().numpy())
    distance = np.maximum(1 - unit @ unit.T, 0)
    np.fill_diagonal(distance, 0)
    found, cutoff = centres_at(torch.from_numpy(distance), keep, 0.21)
    assert len(set(found.tolist())) == keep
    own, _ = peaks(distance, cutoff)
    assert found[: len(own)].tolist() == own
    chosen = list(own)
    for token in found[len(own) :].tolist():
        away = distance[:, chosen].min(axis=1)
        assert away[token] == max(away[other] for other in range(count) if other not in chosen)
        chosen.append(token)


def test_unimportant_tokens_are_recovered_only_nearby() -> None:
    """Two directions; of the unimportant tokens, one is near a centre and one is far from both."""
    keys = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [1.0, 0.1, 0], [0, 0, 1.0]])
    tokens = VisionTokens(
        projected=torch.tensor([[[8.0, 0], [0, 8.0], [4.0, 0], [0, 0.5]]]),
        rotated_keys=keys[None],
        context_attention=torch.tensor([[0.4, 0.4, 0.01, 0.01]]),
    )
    got = pruners.create("pact", important=0.5).select(tokens, 2)
    assert got.indices.tolist() == [[0, 1]]
    assert got.updated is not None
    assert got.updated.tolist() == [[[6.0, 0.0], [0.0, 8.0]]]
    assert got.made is not None
    assert got.made.tolist() == [[True, False]]


@pytest.mark.parametrize("keep", [1, 7, 19])
def test_importance_alone_where_nothing_is_left_to_cluster(keep: int) -> None:
    """`keep` of the most important tokens are what is clustered, so each is a cluster."""
    tokens = images(5, 20)
    pruner = pruners.create("pact", important=0.0, recovery=0.0)
    importance = pruner.relevance(tokens)
    assert importance is not None
    got: Selection = pruner.select(tokens, keep)
    assert torch.equal(got.indices, top_k(importance, keep))
