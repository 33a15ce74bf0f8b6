"""Formats: every convention against float64, ranges over tokens, the compiled path, compressed-tensors."""

import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from qapbench import Format, Grid, fake_quantize, grouped, round_through
from qapbench.methods import affine, affine_kernel

CONVENTIONS: list[dict[str, Any]] = [
    {"symmetric": True},
    {"symmetric": True, "divisor": "half"},
    {"symmetric": True, "divisor": "full"},
    {"zero_point": "in_range"},
    {"zero_point": "clamped"},
    {"zero_point": "free"},
]


def oracle(
    x: np.ndarray, bits: int, symmetric: bool = False, divisor: str = "qmax", zero_point: str = "in_range"
) -> Any:
    """One range, in float64, from the formulas: (values, distance from a rounding boundary in levels)."""
    low, high, half = float(x.min()), float(x.max()), 2 ** (bits - 1)
    if symmetric:
        below, above = {"qmax": (half - 1, half - 1), "half": (half - 0.5, half - 0.5), "full": (half, half - 1)}[
            divisor
        ]
        scale = max(-low / below, high / above)
        least, most, zero = (1 - half if divisor == "qmax" else -half), half - 1, 0.0
    else:
        if zero_point == "in_range":
            low, high = min(low, 0.0), max(high, 0.0)
        least, most, scale = 0, 2 * half - 1, (high - low) / (2 * half - 1)
        zero = float(np.round(-low / scale))
        if zero_point == "clamped":
            zero = float(np.clip(zero, least, most))
    steps = x / scale
    margin = np.abs(steps - np.floor(steps) - 0.5)
    if not symmetric:
        margin = np.minimum(margin, abs(-low / scale - np.floor(-low / scale) - 0.5))
    return (np.clip(np.round(steps) + zero, least, most) - zero) * scale, margin


@pytest.mark.parametrize("convention", CONVENTIONS, ids=str)
@pytest.mark.parametrize("granularity", ["row", "channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_conventions_match_float64(convention: dict[str, Any], granularity: Any, bits: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    x = torch.randn(3, 20, 24, generator=draw) + torch.tensor([0.0, 4.0, -4.0])[:, None, None]
    got = Format(bits=bits, granularity=granularity, **convention)(x).numpy()
    axes = {"row": (0, 1), "channel": (0, 2), "tensor": (0,)}[granularity]
    for place in itertools.product(*(range(x.shape[axis]) for axis in axes)):
        where: list[Any] = [slice(None)] * 3
        for axis, index in zip(axes, place, strict=True):
            where[axis] = index
        part = tuple(where)
        wanted, margin = oracle(x.numpy().astype(np.float64)[part], bits, **convention)
        clear = margin > 1e-4
        assert clear.mean() > 0.5
        np.testing.assert_allclose(got[part][clear], wanted[clear], rtol=0, atol=2e-5)


@pytest.mark.parametrize("convention", CONVENTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [None, 1, 7, 32])
def test_blocks_equal_one_pass_to_the_bit(
    convention: dict[str, Any], dtype: torch.dtype, size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The eager path in place, some rows at a time, against what is compiled and what a fixed grid answers."""
    x = (torch.randn(3, 11, 64, generator=torch.Generator().manual_seed(5)) * 3).to(dtype)
    x[0, 0], x[0, 1], x[1, :, :16] = 0, -1.5, x[1, :, :16].round()
    x[2, 3, ::2], x[2, 3, 1::2] = 7.5, -7.5  # both ends are ties: one level more than there is
    monkeypatch.setattr(affine, "BLOCK", 256)
    eager = fake_quantize(x, 4, size, **convention)
    levels = affine.Levels(4, **convention)
    once, fixed = torch.empty_like(x), torch.empty_like(x)
    parts = zip(grouped(x, size), grouped(once, size), grouped(fixed, size), strict=True)
    for values, out, by_grid in parts:
        affine._whole(values, levels, out)
        by_grid.copy_(Grid.of(values, Format(bits=4, **convention))(values))
    assert torch.equal(eager, once)
    assert torch.equal(eager, fixed)


@pytest.mark.skipif(affine_kernel.kernel() is None, reason="no C compiler")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_compiled_loops_have_the_bits_of_the_eager_computation(
    dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of NaN, infinities, zeros of both signs, the ends of the dtype, and groups that no vector fills."""
    draw, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    monkeypatch.setattr(affine_kernel, "SHARE", 512)
    torch.set_num_threads(threads)
    compared = 0
    try:
        for scale in (1.0, 1e-42, 1e30, 3e38):
            x = (torch.randn(3, 7, 256, generator=draw) * scale).to(dtype)
            x[0, 0, 3], x[1, 2, 5], x[2, 2], x[2, 3], x[2, 4] = torch.nan, torch.inf, 0, -0.0, 1.5
            x[1, 3], x[1, 4] = x[1, 3].abs(), -x[1, 4].abs()
            for convention, (bits, size) in itertools.product(CONVENTIONS, [(4, 128), (4, None), (8, 64), (3, 40)]):
                monkeypatch.delenv(affine.COMPILE, raising=False)
                eager = fake_quantize(x, bits, size, **convention)
                monkeypatch.setenv(affine.COMPILE, "1")
                loops = fake_quantize(x, bits, size, **convention)
                broken, whole = eager.isnan(), torch.int32 if dtype == torch.float32 else torch.int16
                assert torch.equal(broken, loops.isnan())
                bits_of = [one.masked_fill(broken, 0).view(whole) for one in (eager, loops)]
                assert torch.equal(*bits_of), (scale, convention, bits, size)
                compared += int((~broken).sum())
    finally:
        torch.set_num_threads(before)
    assert compared > 0
    kernel = affine_kernel.kernel()
    assert kernel is not None and kernel.takes(x[None], x[None]) == (dtype != torch.float16)


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any) -> Any:
        raise RuntimeError("no C++ compiler\nat all")

    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    plain = fake_quantize(x, 4, 16)
    monkeypatch.setenv(affine.COMPILE, "1")
    monkeypatch.setenv(affine_kernel.COMPILER, "no-such-compiler")
    monkeypatch.setattr(torch, "compile", broken)
    for made in (affine_kernel.kernel, affine._compiled):
        made.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"no C compiler works here \(.*no-such-compiler"):
            assert torch.equal(fake_quantize(x, 4, 16), plain)
        with pytest.warns(UserWarning, match=r"torch\.compile fails here \(no C\+\+ compiler\)"):
            assert affine._compiled() is None  # what other devices are given
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            fake_quantize(x, 4, 16)
            affine._compiled()
    finally:
        for made in (affine_kernel.kernel, affine._compiled):
            made.cache_clear()


def test_padding_never_enters_a_range() -> None:
    draw = torch.Generator().manual_seed(1)
    x, padding = torch.randn(2, 9, 8, generator=draw), torch.zeros(2, 9, dtype=torch.bool)
    padding[1, :4] = True
    x[padding] = 100
    for granularity in ("channel", "tensor"):
        format = Format(bits=4, granularity=granularity)
        out = format(x, ~padding)
        assert torch.equal(out[0], format(x[:1])[0]), "a sample's range is its own"
        assert torch.equal(out[1, 4:], format(x[1:, 4:])[0])
        nothing = format(x, torch.zeros_like(padding))
        assert torch.isfinite(nothing).all()


def test_gradients_pass_rounding() -> None:
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
    out = fake_quantize(x, 4, 8)
    assert torch.equal(out.detach(), fake_quantize(x.detach(), 4, 8))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 1
    y = torch.tensor([0.2, 1.7], requires_grad=True)
    round_through(y * 2).sum().backward()
    assert y.grad is not None
    assert y.grad.tolist() == [2, 2]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"group_size": 8, "granularity": "tensor"}, "`group_size` groups the channels of a row"),
        ({"divisor": "half"}, "`divisor` is that of a symmetric scale"),
        ({"symmetric": True, "zero_point": "free"}, "a symmetric format has no `zero_point`"),
    ],
)
def test_formats_that_contradict_themselves(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Format(bits=4, **fields)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 32])
def test_compressed_tensors_agrees(bits: int, symmetric: bool, group_size: int | None) -> None:
    """Our 'half' and 'in_range' conventions are its own; it quantizes activations token by token, or group-wise."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as reference
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x: Tensor = torch.randn(2, 9, 96, generator=torch.Generator().manual_seed(bits))
    args = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="group" if group_size else "token",
        group_size=group_size,
        dynamic=True,
    )
    expected = reference(x, *compute_dynamic_scales_and_zp(x, args, torch.nn.Module()), args)
    convention: Any = {"divisor": "half"} if symmetric else {}
    got = Format(bits=bits, symmetric=symmetric, group_size=group_size, **convention)(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
