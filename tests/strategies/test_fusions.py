"""Each fusion against its formula."""

import hypothesis.strategies as st
import numpy as np
import strategy_oracles as oracle
import torch
from hypothesis import given

from qapbench import fusions


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Two scores in (0, 1] per image, some of them tied."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 30)))
    relevance, sensitivity = rng.uniform(1e-6, 1, size=(2, *shape))
    if draw(st.booleans()):
        relevance, sensitivity = np.ceil(relevance * 4) / 4, np.ceil(sensitivity * 4) / 4
    return relevance.astype(np.float32), sensitivity.astype(np.float32)


def fuse(name: str, pair: tuple[np.ndarray, np.ndarray], **params: float) -> np.ndarray:
    return fusions.create(name, **params)(*map(torch.from_numpy, pair)).numpy()


@given(pairs(), st.floats(0, 1), st.floats(0, 5))
def test_of_values(pair: tuple[np.ndarray, np.ndarray], semantic: float, weight: float) -> None:
    r, s = (part.astype(np.float64) for part in pair)
    expected = {
        "convex": ({"semantic": semantic}, semantic * r + (1 - semantic) * s),
        "add": ({"weight": weight}, r + weight * s),
        "multiply": ({"weight": weight}, r * s**weight),
    }
    for name, (params, wanted) in expected.items():
        np.testing.assert_allclose(fuse(name, pair, **params), wanted, rtol=1e-5, atol=1e-7)


@given(pairs(), st.floats(0, 1))
def test_rank(pair: tuple[np.ndarray, np.ndarray], semantic: float) -> None:
    """The relevance's own values, in the order of the weighted mean ranks (up to ties)."""
    fused = fuse("rank", pair, semantic=semantic)
    np.testing.assert_array_equal(np.sort(fused, axis=-1), np.sort(pair[0], axis=-1))
    for out, r, s in zip(fused, *pair, strict=True):
        wanted = semantic * oracle.mean_rank(r) + (1 - semantic) * oracle.mean_rank(s)
        higher = wanted[:, None] > wanted[None, :] + 1e-5
        assert (out[:, None] >= out[None, :])[higher].all()


def test_rank_by_hand() -> None:
    relevance = torch.tensor([[0.9, 0.5, 0.1, 0.1]])
    sensitivity = torch.tensor([[0.0, 0.2, 1.0, 0.4]])
    # Mean ranks: relevance 3 2 .5 .5; sensitivity 0 1 3 2. Half of each: 1.5 1.5 1.75 1.25, tie to the lower.
    out = fusions.create("rank", semantic=0.5)(relevance, sensitivity)
    torch.testing.assert_close(out, torch.tensor([[0.5, 0.1, 0.9, 0.1]]))


def test_default_is_seven_tenths() -> None:
    out = fusions.create("convex")(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(out, torch.tensor([[0.7, 0.3]]))


@given(pairs())
def test_the_ends(pair: tuple[np.ndarray, np.ndarray]) -> None:
    relevance, sensitivity = pair
    np.testing.assert_array_equal(fuse("convex", pair, semantic=1.0), relevance)
    np.testing.assert_array_equal(fuse("convex", pair, semantic=0.0), sensitivity)
    np.testing.assert_array_equal(fuse("rank", pair, semantic=1.0), relevance)
    np.testing.assert_array_equal(fuse("add", pair, weight=0.0), relevance)
    np.testing.assert_array_equal(fuse("multiply", pair, weight=0.0), relevance)
