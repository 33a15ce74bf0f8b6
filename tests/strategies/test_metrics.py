"""Each metric and the min-max normalisation against float64."""

import inspect
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import strategy_oracles as oracle
import torch
from hypothesis import given
from hypothesis.extra import numpy as hnp

from qapbench import metrics, min_max, quantizers
from qapbench.hashing import code_files
from qapbench.strategies.metrics.quantization_error import quantization_error


@st.composite
def features(draw: st.DrawFn) -> np.ndarray:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 70)))
    x = rng.normal(loc=rng.normal(), size=shape) * 10 ** rng.uniform(-2, 2)
    x[rng.random(shape) < 0.03] *= 20
    return x.astype(np.float32)


def residual(x: np.ndarray, quantized: np.ndarray) -> np.ndarray:
    return np.sqrt(((x - quantized) ** 2).sum(axis=-1))


def grouped(x: np.ndarray, bits: int, group_size: int, symmetric: bool = True) -> np.ndarray:
    return residual(x, oracle.fake_quantize(x, bits, group_size, symmetric)[0])


ORACLES = {
    "l1": lambda x: np.abs(x).sum(axis=-1),
    "l2": lambda x: np.sqrt((x**2).sum(axis=-1)),
    "linf": lambda x: np.abs(x).max(axis=-1),
    "variance": lambda x: ((x - x.mean(axis=-1, keepdims=True)) ** 2).mean(axis=-1),
    "outlier_intensity": lambda x: x.max(axis=-1) - x.min(axis=-1),
}


def assert_close(got: torch.Tensor, wanted: np.ndarray, x: np.ndarray) -> None:
    """Relative to the size of the token: a residual is a difference of values that large."""
    size = np.abs(x).max() * np.sqrt(x.shape[-1])
    np.testing.assert_allclose(got.double().numpy(), wanted, rtol=1e-4, atol=2e-6 * size)


@pytest.mark.parametrize("name", sorted(ORACLES))
@given(x=features())
def test_plain_metrics(name: str, x: np.ndarray) -> None:
    got, wanted = metrics.create(name)(torch.from_numpy(x)), ORACLES[name](x.astype(np.float64))
    largest = float(np.abs(x).max())
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-5, atol=1e-6 * largest * max(largest, 1))


@given(features(), st.integers(2, 8))
def test_absmax_error(x: np.ndarray, bits: int) -> None:
    wanted = grouped(x.astype(np.float64), bits, x.shape[-1])
    assert_close(metrics.create("absmax_error", bits=bits)(torch.from_numpy(x)), wanted, x)


@given(features(), st.integers(2, 8), st.integers(1, 80), st.booleans())
def test_group_error(x: np.ndarray, bits: int, group_size: int, symmetric: bool) -> None:
    params = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    wanted = grouped(x.astype(np.float64), **params)
    assert_close(metrics.create("group_error", **params)(torch.from_numpy(x)), wanted, x)


@given(features(), st.integers(2, 8), st.floats(50, 100))
def test_clip_error(x: np.ndarray, bits: int, percent: float) -> None:
    exact = x.astype(np.float64)
    wanted = residual(exact, oracle.clip_quantize(exact, bits, percent))
    assert_close(metrics.create("clip_error", bits=bits, percentile=percent)(torch.from_numpy(x)), wanted, x)


@given(features(), st.integers(2, 5))
def test_combined(x: np.ndarray, bits: int) -> None:
    """Equal weights; each part normalised over the tokens of its own image."""
    exact = x.astype(np.float64)
    parts = [grouped(exact, bits, 16), ORACLES["outlier_intensity"](exact)]
    wanted = sum(oracle.min_max(part) for part in parts)
    # Normalising divides by the spread over tokens: what float32 does to a score, relative to that spread.
    error = 3e-6 * np.abs(x).max() * np.sqrt(x.shape[-1])
    noise = sum(error / (np.ptp(part, axis=-1) + 1e-6) for part in parts)
    got = metrics.create("combined", bits=bits, group_size=16)(torch.from_numpy(x)).double().numpy()
    assert (np.abs(got - wanted) <= 1e-5 + noise[:, None]).all()


@given(features())
def test_the_three_errors_are_one(x: np.ndarray) -> None:
    tokens = torch.from_numpy(x)
    for name in ("absmax", "clip"):
        assert torch.equal(metrics.create(f"{name}_error")(tokens), quantization_error(tokens, quantizers.create(name)))
    groups = quantizers.create("groupwise")
    assert torch.equal(metrics.create("group_error")(tokens), quantization_error(tokens, groups))


@pytest.mark.parametrize("name", ["absmax_error", "clip_error", "group_error", "combined"])
def test_an_edited_quantizer_changes_the_identity_of_its_metrics(name: str) -> None:
    target = metrics.entry(name).target
    files = code_files(Path(inspect.getfile(target)), target.__module__)
    assert {f"qapbench.strategies.quantizers.{module}" for module in ("absmax", "clip", "groupwise")} <= set(files)


def test_by_hand() -> None:
    x = torch.tensor([[[3.0, -4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]])
    expected = {"l1": [7, 4], "l2": [5, 2], "linf": [4, 1], "variance": [6.1875, 0]}
    expected["outlier_intensity"] = [7, 0]
    for name, wanted in expected.items():
        assert metrics.create(name)(x).tolist() == [wanted]
    # 2 bits symmetric: scale 4, levels -4 0 4; 3 -> 4. Constant rows are exact.
    assert metrics.create("absmax_error", bits=2)(x).tolist() == [[1, 0]]
    # Halves: [3, -4] as before, [0, 0] exact.
    assert metrics.create("group_error", bits=2, group_size=2)(x).tolist() == [[1, 0]]


scores = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 12)),
    elements=st.floats(-1000, 1000, width=32, allow_subnormal=False),
)


@given(scores)
def test_min_max(x: np.ndarray) -> None:
    got = min_max(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(got, oracle.min_max(x.astype(np.float64)), rtol=1e-5, atol=1e-6)
    assert (got.max(axis=-1) == 1).all()
    assert (got >= 0).all()
    for row, normalised in zip(x, got, strict=True):
        order = row.argsort(kind="stable")
        assert (np.diff(normalised[order]) >= 0).all()


def test_min_max_of_constants_and_of_each_image() -> None:
    assert min_max(torch.tensor([[5.0, 5.0], [0.0, 10.0]])).tolist()[0] == [1, 1]
    assert min_max(torch.tensor([[0.0, 1.0], [0.0, 1000.0]]))[:, 1].tolist() == [1, 1]
