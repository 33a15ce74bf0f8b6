"""Rotations against their dense matrices, NF4 against its definition, in float64."""

import numpy as np
import pytest
import torch
from scipy.linalg import hadamard
from scipy.stats import norm

from qapbench import Rotation, normal_float
from qapbench.methods.normal_float import double_quantize, dynamic_levels, nf4_levels


@pytest.mark.parametrize("width", [1, 2, 3, 8, 12, 40, 96])
def test_rotation_is_signs_then_a_kronecker_product(width: int) -> None:
    rotation = Rotation.random(width, seed=3)
    odd = len(rotation.mixer)
    size = width // odd
    dense = np.kron(rotation.mixer.double().numpy(), hadamard(size) / np.sqrt(size)) * rotation.signs.numpy()
    np.testing.assert_allclose(dense @ dense.T, np.eye(width), atol=1e-6)
    x = torch.randn(4, 5, width, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(rotation(x).numpy(), x.numpy() @ dense.T, atol=1e-5)
    np.testing.assert_allclose(rotation.inverse(rotation(x)).numpy(), x.numpy(), atol=1e-5)
    assert torch.equal(rotation(x)[1:2], rotation(x[1:2])), "depends on the batch"


def test_rotation_is_seeded() -> None:
    one, same, other = (Rotation.random(24, seed) for seed in (1, 1, 2))
    assert torch.equal(one.signs, same.signs)
    assert torch.equal(one.mixer, same.mixer)
    assert not torch.equal(one.mixer, other.mixer)
    assert (Rotation.random(64, 5).mixer.abs() == 1).all()


def test_rotation_spreads_outliers() -> None:
    x = torch.zeros(1, 128)
    x[0, 7] = 128**0.5
    torch.testing.assert_close(Rotation.random(128, 0)(x).abs(), torch.ones(1, 128))


def test_nf4_levels_are_quantiles() -> None:
    """Section 3: 2^(k-1) quantiles of N(0, 1) below and 2^(k-1) + 1 above zero, joined at zero, scaled to [-1, 1]."""
    end = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above, below = norm.ppf(np.linspace(end, 0.5, 9))[:-1], -norm.ppf(np.linspace(end, 0.5, 8))[:-1]
    levels = np.sort([*above, 0.0, *below])
    np.testing.assert_allclose(nf4_levels().numpy(), levels / levels.max(), atol=1e-6)


@pytest.mark.parametrize("width", [64, 96, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_matches_a_table(width: int, dtype: torch.dtype) -> None:
    w = torch.randn(5, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    w[1, :64] = 0
    got, table = normal_float(w, 64, double=False), nf4_levels().double().numpy()
    assert got.dtype == dtype
    for row, out in zip(w.double().numpy(), got.double().numpy(), strict=True):
        for start in range(0, width, 64):
            block = row[start : start + 64]
            top = np.abs(block).max()
            nearest = np.abs(block[:, None] / (top or 1) - table).argmin(axis=1)
            wanted = torch.from_numpy(table[nearest] * top).to(dtype).double().numpy()
            np.testing.assert_allclose(out[start : start + 64], wanted, atol=1e-6 * (top + 1))


def test_quantized_scales_match_a_table() -> None:
    scales = torch.rand(40, 16, generator=torch.Generator().manual_seed(1)) + 0.1
    table, mean = dynamic_levels().double().numpy(), float(scales.mean())
    assert len(table) == 256
    assert (np.diff(table) > 0).all()
    flat = scales.double().numpy().ravel() - mean
    wanted = []
    for start in range(0, len(flat), 256):
        part = flat[start : start + 256]
        top = np.abs(part).max()
        wanted.append(table[np.abs(part[:, None] / top - table).argmin(axis=1)] * top)
    off = np.abs(double_quantize(scales).double().numpy().ravel() - mean - np.concatenate(wanted))
    assert (off > 1e-6).mean() < 0.01, "more than ties"
