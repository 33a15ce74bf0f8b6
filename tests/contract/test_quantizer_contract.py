"""What every quantizer owes: same shape and dtype, float32 inside, rows apart, nothing silent."""

import pytest
import torch

from qapbench import VisionTokens, quantizers

each_quantizer = pytest.mark.parametrize("name", quantizers.names())
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def options(name: str) -> list[dict[str, object]]:
    """Defaults, and what the item's own parameters make worth trying."""
    known = quantizers.describe(name)["parameters"]
    tried = [{}, {"bits": 2}, {"bits": 8}, {"symmetric": False}, {"symmetric": False, "group_size": 7}]
    return [params for params in tried if set(params) <= set(known)]


each_setting = pytest.mark.parametrize(
    "name, params",
    [pytest.param(name, p, id=f"{name}-{p}") for name in quantizers.names() for p in options(name)],
)


@each_setting
@pytest.mark.parametrize("dtype", DTYPES)
def test_shape_dtype_and_determinism(
    name: str, params: dict[str, object], dtype: torch.dtype, tokens: VisionTokens
) -> None:
    x = tokens.projected.to(dtype)
    before = x.clone()
    out = quantizers.create(name, **params)(x)
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert torch.equal(out, quantizers.create(name, **params)(x))
    assert torch.equal(x, before), "the input was changed"
    assert not torch.equal(out, x)


@each_setting
def test_half_precision_is_computed_in_float32(name: str, params: dict[str, object], tokens: VisionTokens) -> None:
    x = tokens.projected.bfloat16()
    quantize = quantizers.create(name, **params)
    assert torch.equal(quantize(x), quantize(x.float()).bfloat16())


@each_setting
def test_rows_never_share_a_scale(name: str, params: dict[str, object], tokens: VisionTokens) -> None:
    quantize = quantizers.create(name, **params)
    x = tokens.projected
    assert torch.equal(quantize(x), torch.cat([quantize(x[index : index + 1]) for index in range(3)]))
    assert torch.equal(quantize(x)[1, 5], quantize(x[1, 5]))


@each_setting
@pytest.mark.parametrize("width", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize("value", [0.0, 3.0, -0.1, 1e-8, -6e4])
def test_constant_rows_are_exact(name: str, params: dict[str, object], width: int, value: float) -> None:
    """All-zero and all-equal groups, whether or not the group size divides the width."""
    x = torch.full((2, 3, width), value)
    assert torch.equal(quantizers.create(name, **params)(x), x)


@each_setting
@pytest.mark.parametrize("width", [1, 96, 129, 300])
def test_the_tail_is_quantized_too(name: str, params: dict[str, object], width: int) -> None:
    x = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(3))
    out = quantizers.create(name, **params)(x)
    assert out.shape == x.shape
    assert torch.isfinite(out).all()
    if width > 1 and quantizers.validate(name, params).get("bits", 0) <= 4:
        assert not torch.equal(out[..., -7:], x[..., -7:])


@each_setting
@pytest.mark.parametrize("place", [0, 50, 95])
def test_a_nan_never_becomes_a_number(name: str, params: dict[str, object], place: int, tokens: VisionTokens) -> None:
    x = tokens.projected.clone()
    x[0, 4, place] = float("nan")
    out = quantizers.create(name, **params)(x)
    assert out[0, 4, place].isnan()
    others = torch.ones(3, 49, dtype=torch.bool)
    others[0, 4] = False
    assert torch.isfinite(out[others]).all(), "a NaN spread to other tokens"


@each_setting
def test_layout_does_not_matter(name: str, params: dict[str, object], tokens: VisionTokens) -> None:
    quantize = quantizers.create(name, **params)
    assert torch.equal(quantize(tokens.projected.mT.contiguous().mT), quantize(tokens.projected))


@each_quantizer
def test_more_bits_lose_less(name: str, tokens: VisionTokens) -> None:
    if "bits" not in quantizers.describe(name)["parameters"]:
        pytest.skip(f"{name} has a fixed width")
    x = tokens.projected
    errors = [float((quantizers.create(name, bits=bits)(x) - x).norm()) for bits in (2, 3, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[-1]
