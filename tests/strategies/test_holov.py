"""HoloV against its rule taken literally, in float64."""

import itertools
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import strategy_oracles as oracle
import torch
from hypothesis import given

from qapbench import VisionTokens, pruners
from qapbench.strategies.pruners.holov import deal

LEAD = 1e-5  # float32 may decide otherwise below it


def images(seed: int, count: int, batch: int = 2) -> VisionTokens:
    draw = torch.Generator().manual_seed(seed)
    attention = (2 * torch.randn(batch, count, generator=draw)).softmax(dim=-1)
    return VisionTokens(torch.randn(batch, count, 7, generator=draw), cls_attention=attention)


def worth(attention: oracle.Array, features: oracle.Array, context: float) -> float:
    """The score of a run: the mean of its tokens' scores."""
    size = len(attention)
    if size == 1:
        return float(attention[0])
    norms = [np.sqrt(row @ row) + 1e-6 for row in features]
    variances = []
    for one in range(size):
        cosines = [
            0.0 if one == other else float(features[one] @ features[other]) / norms[one] / norms[other]
            for other in range(size)
        ]
        mean = sum(cosines) / (size - 1)
        variances.append(sum((cosine - mean) ** 2 for cosine in cosines) / (size - 1))
    salience = [1000 * a for a in attention]
    scale = np.mean(np.abs(salience)) / (np.mean(np.abs(variances)) + 1e-6)
    return float(np.mean([s + context * v * scale for s, v in zip(salience, variances, strict=True)]))


def loop(attention: oracle.Array, features: oracle.Array, keep: int, runs: int, context: float) -> tuple[Any, float]:
    """Kept tokens of one image, and how far the closest decision was from another one."""
    count = len(attention)
    runs = min(runs, count)
    sizes = [count // runs + (run < count % runs) for run in range(runs)]
    starts = [sum(sizes[:run]) for run in range(runs)]
    parts = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    scores = np.array([worth(attention[part], features[part], context) for part in parts])
    exact = scores / (scores.sum() + 1e-6) * keep
    lead = float(np.min(np.abs(exact - np.round(exact))))
    shares = [min(int(share), size) for share, size in zip(exact, sizes, strict=True)]
    order = sorted(range(runs), key=lambda run: (-scores[run], run))
    if runs > 1:
        lead = min(lead, min(scores[a] - scores[b] for a, b in itertools.pairwise(order)) / scores.max())
    while sum(shares) < keep:
        for run in order:
            if shares[run] < sizes[run] and sum(shares) < keep:
                shares[run] += 1
    kept: list[int] = []
    for part, share in zip(parts, shares, strict=True):
        ranked = sorted(part, key=lambda token: (-attention[token], token))
        if 0 < share < len(part):
            lead = min(lead, (attention[ranked[share - 1]] - attention[ranked[share]]) / attention[ranked[0]])
        kept += ranked[:share]
    return sorted(kept), lead


@given(
    st.integers(0, 2**32 - 1),
    st.integers(2, 60),
    st.integers(1, 20),
    st.sampled_from([0.0, 0.09, 2.0]),
    st.booleans(),
    st.data(),
)
def test_matches_a_plain_loop(seed: int, count: int, runs: int, context: float, fused: bool, data: Any) -> None:
    """Its source: llava/model/utils.py of obananas/HoloV at 1d2e65e; what runs cannot hold goes on to others here."""
    keep = data.draw(st.integers(1, count - 1), label="keep")
    tokens = images(seed, count)
    sensitivity = tokens.projected.norm(dim=-1) if fused else None
    got = pruners.create("holov", runs=runs, context=context).select(tokens, keep, sensitivity).indices
    for image in range(2):
        attention = tokens.require("cls_attention", "test")[image].double().numpy()
        if sensitivity is not None:
            both = oracle.min_max(np.stack([attention, sensitivity[image].double().numpy()]))
            attention = attention + (0.7 * both[0] + 0.3 * both[1] - both[0]) * (attention.max() - attention.min())
        kept, lead = loop(attention, tokens.projected[image].double().numpy(), keep, runs, context)
        if lead > LEAD:
            assert got[image].tolist() == kept


@pytest.mark.parametrize(
    "worth, sizes, keep, wanted",
    [
        ([3.0, 1.0], [4, 4], 4, [3, 1]),
        ([1.0, 1.0, 1.0], [5, 5, 5], 5, [2, 2, 1]),
        ([9.0, 1.0, 0.5], [2, 3, 3], 6, [2, 2, 2]),  # the first holds two; the rest goes on in turn
        ([9.0, 0.0, 0.0], [2, 2, 2], 5, [2, 2, 1]),
        ([0.0, 0.0], [3, 3], 3, [2, 1]),
    ],
)
def test_what_a_run_cannot_hold_goes_to_others(worth: list[float], sizes: list[int], keep: int, wanted: Any) -> None:
    assert deal(torch.tensor(worth), sizes, keep) == wanted


def test_no_run_of_attention_is_forgotten() -> None:
    """All high attention is in one run; the others get their share of the budget all the same."""
    attention = torch.full((1, 64), 0.01)
    attention[0, :4] = torch.tensor([0.05, 0.04, 0.03, 0.02])
    tokens = VisionTokens(torch.randn(1, 64, 6, generator=torch.Generator().manual_seed(0)), cls_attention=attention)
    kept = pruners.create("holov", runs=4).select(tokens, 16).indices[0]
    assert kept[:4].tolist() == [0, 1, 2, 3]
    assert all(((kept >= start) & (kept < start + 16)).sum() >= 3 for start in (0, 16, 32, 48))
