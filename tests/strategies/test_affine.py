"""The fake-quantization core against float64, and the properties that any uniform quantizer has."""

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import strategy_oracles as oracle
import torch
from hypothesis import given
from hypothesis.extra import numpy as hnp

from qapbench import Format, fake_quantize, quantizers

BITS = st.integers(2, 8)
values = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 20)),
    elements=st.floats(-100, 100, width=32, allow_subnormal=False),
)
groups = st.one_of(st.none(), st.integers(1, 24))


@st.composite
def activations(draw: st.DrawFn) -> np.ndarray:
    """Rows like a model's: normal, some channels far out, some groups of one sign or constant."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 80))
    x = rng.normal(size=(rows, width)) * 10 ** rng.uniform(-3, 2, size=(rows, 1))
    x[:, rng.random(width) < 0.05] *= 30
    kind = draw(st.sampled_from(["plain", "positive", "negative", "constant part"]))
    if kind == "positive":
        x = np.abs(x) + 1
    elif kind == "negative":
        x = -np.abs(x) - 1
    elif kind == "constant part":
        x[:, : width // 2] = x[0, 0]
    return x.astype(np.float32)


@given(activations(), BITS, groups, st.booleans())
def test_matches_float64(x: np.ndarray, bits: int, group_size: int | None, symmetric: bool) -> None:
    """Wherever float32 cannot land on the other side of a rounding boundary."""
    got = fake_quantize(torch.from_numpy(x), bits, group_size, symmetric).numpy()
    wanted, margin = oracle.fake_quantize(x.astype(np.float64), bits, group_size, symmetric)
    clear = margin > 1e-6 * 2**bits + 1e-5
    size = np.abs(x).max(axis=-1, keepdims=True)
    assert (np.abs(got - wanted)[clear] <= (1e-6 * size + 0 * x)[clear]).all()
    if x.size > 20 and (group_size is None or group_size > 4):
        assert clear.mean() > 0.7, "the margin leaves too little to compare"


@given(values, BITS, groups, st.booleans())
def test_error_is_at_most_half_a_level(x: np.ndarray, bits: int, group_size: int | None, symmetric: bool) -> None:
    got = fake_quantize(torch.from_numpy(x), bits, group_size, symmetric).numpy()
    step = group_size or x.shape[1]
    for start in range(0, x.shape[1], step):
        part = x[:, start : start + step].astype(np.float64)
        if symmetric:
            scale = np.abs(part).max(axis=1) / (2 ** (bits - 1) - 1)
        else:
            scale = (np.maximum(part.max(axis=1), 0) - np.minimum(part.min(axis=1), 0)) / (2**bits - 1)
        error = np.abs(got[:, start : start + step] - part).max(axis=1)
        assert (error <= scale / 2 + 1e-6 * np.abs(part).max(axis=1) + 1e-30).all()


@given(values, BITS, groups, st.booleans())
def test_zero_stays_zero_and_levels_are_few(x: np.ndarray, bits: int, group_size: int | None, symmetric: bool) -> None:
    got = fake_quantize(torch.from_numpy(x), bits, group_size, symmetric).numpy()
    assert (got[x == 0] == 0).all()
    step = group_size or x.shape[1]
    for start in range(0, x.shape[1], step):
        for row in got[:, start : start + step]:
            assert len(np.unique(row)) <= 2**bits - symmetric


@given(values, BITS, groups)
def test_symmetric_is_odd(x: np.ndarray, bits: int, group_size: int | None) -> None:
    got = torch.from_numpy(x)
    quantized = fake_quantize(got, bits, group_size, symmetric=True)
    assert torch.equal(fake_quantize(-got, bits, group_size, symmetric=True), -quantized)


@given(values, st.integers(1, 24), st.booleans())
def test_group_tails(x: np.ndarray, group_size: int, symmetric: bool) -> None:
    """A group's levels come from that group alone, the shorter last one included."""
    whole = fake_quantize(torch.from_numpy(x), 4, group_size, symmetric)
    groups = torch.from_numpy(x).split(group_size, dim=-1)
    parts = [fake_quantize(group, 4, None, symmetric) for group in groups]
    assert torch.equal(whole, torch.cat(parts, dim=-1))


def test_half_to_even() -> None:
    symmetric = fake_quantize(torch.tensor([7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]), 4, symmetric=True)
    assert symmetric.tolist() == [7, 0, 2, 2, 0, -2, -2]
    asymmetric = fake_quantize(torch.tensor([0.0, 15.0, 0.5, 1.5, 2.5, 3.5]), 4)
    assert asymmetric.tolist() == [0, 15, 0, 2, 2, 4]


def test_asymmetric_range_reaches_zero() -> None:
    """[5, 6] takes the range [0, 6]: with the range [5, 6] the ends would be exact and zero not a level."""
    out = fake_quantize(torch.tensor([5.0, 5.5, 6.0]), 2)
    assert out.tolist() == [4.0, 6.0, 6.0]
    assert fake_quantize(torch.tensor([-5.0, -5.5, -6.0]), 2).tolist() == [-4.0, -6.0, -6.0]


def test_symmetric_leaves_the_lowest_level_out() -> None:
    assert fake_quantize(torch.tensor([-8.0, 4.0, 7.0]), 4, symmetric=True)[0] == -8.0
    assert fake_quantize(torch.tensor([-1.0, 0.4, 0.6]), 2, symmetric=True).tolist() == [-1, 0, 1]


@given(activations(), BITS, st.floats(1, 100))
def test_clip_matches_float64(x: np.ndarray, bits: int, percent: float) -> None:
    """The residual is continuous where rounding is not, so it compares without a margin."""
    got = quantizers.create("clip", bits=bits, percentile=percent)(torch.from_numpy(x)).numpy()
    wanted = oracle.clip_quantize(x.astype(np.float64), bits, percent)
    size = np.abs(x).max(axis=-1, keepdims=True)
    np.testing.assert_array_less(np.abs(np.abs(got - x) - np.abs(wanted - x)), 2e-6 * size + 1e-30 + 0 * x)


@given(activations(), BITS)
def test_absmax_and_groupwise_are_the_core(x: np.ndarray, bits: int) -> None:
    rows = torch.from_numpy(x)
    plain = fake_quantize(rows, bits, symmetric=True)
    assert torch.equal(quantizers.create("absmax", bits=bits)(rows), plain)
    assert torch.equal(quantizers.create("clip", bits=bits, percentile=100.0)(rows), plain)
    for symmetric in (True, False):
        groupwise = quantizers.create("groupwise", bits=bits, group_size=16, symmetric=symmetric)
        assert torch.equal(groupwise(rows), fake_quantize(rows, bits, 16, symmetric))


@pytest.mark.parametrize("symmetric", [True, False])
def test_extremes(symmetric: bool) -> None:
    """The smallest and the largest values of half precision neither vanish into NaN nor overflow."""
    tiny = torch.tensor([6e-8, -6e-8, 0.0], dtype=torch.float16)
    huge = torch.tensor([65504.0, -65504.0, 1.0], dtype=torch.float16)
    for x in (tiny, huge, torch.tensor([1e-45, -1e-45, 0.0])):
        assert torch.isfinite(fake_quantize(x, 4, symmetric=symmetric)).all()


CONVENTIONS = [
    *({"symmetric": True, "divisor": divisor} for divisor in ("qmax", "half", "full")),
    *({"zero_point": zero_point} for zero_point in ("in_range", "clamped", "free")),
]
each_convention = pytest.mark.parametrize("convention", CONVENTIONS, ids=lambda each: "-".join(map(str, each.values())))
EXTREMES = {
    "largest": [3e38, -3e38, 1e38, 0.0],
    "end of float32": [3.4028234e38, -3.4028234e38, 1.0, -2e38],
    "positive": [3e38, 2.9e38, 1e38, 2e38],
    "negative": [-3e38, -2.9e38, -1e38, -2e38],
    "denormal": [1e-44, -3e-44, 7e-45, 0.0],
    "barely normal": [1.2e-38, -3e-38, 2e-38, 5e-39],
}


@each_convention
@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_ends_of_float32(convention: dict[str, Any], case: str, bits: int) -> None:
    """Finite values stay finite and near their level. Scales end at the smallest normal number."""
    x = torch.tensor([EXTREMES[case]])
    out = fake_quantize(x, bits, **convention)
    assert torch.equal(out, Format(bits=bits, **convention).levels.of(x)(x)), "the fixed grid"
    assert torch.isfinite(out).all()
    half = x.clamp(-3.38e38, 3.38e38).bfloat16()  # it ends a little before float32
    assert torch.isfinite(fake_quantize(half, bits, **convention)).all()
    if convention.get("zero_point") == "clamped" and case in ("positive", "negative"):
        return  # this convention cuts such groups off
    low, high = float(x.double().min()), float(x.double().max())
    if convention.get("zero_point") == "in_range":
        low, high = min(low, 0), max(high, 0)
    scale = (max(-low, high) / (2 ** (bits - 1) - 1)) if "symmetric" in convention else (high - low) / (2**bits - 1)
    assert float((out.double() - x.double()).abs().max()) <= max(0.51 * scale, 0.5 * 2.0**-126)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@each_convention
def test_a_group_that_is_not_finite_is_nan(convention: dict[str, Any], bad: float) -> None:
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    x[1, 3] = bad
    out = fake_quantize(x, 4, 8, **convention)
    assert out[1, :8].isnan().all()
    x[1, 3] = 0.0
    for rows in (slice(0, 1), slice(2, 3)):
        assert torch.equal(out[rows], fake_quantize(x, 4, 8, **convention)[rows])
    assert torch.equal(out[1, 8:], fake_quantize(x, 4, 8, **convention)[1, 8:])


@pytest.mark.parametrize("name", quantizers.names())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_no_quantizer_makes_a_number_of_what_is_not_finite(name: str, bad: float) -> None:
    x = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    x[1, 3] = bad
    out = quantizers.create(name)(x)
    assert out[1, 3].isnan()
    assert out[0].isfinite().all()
