"""Packed weights: codes come back as they were, and values are those of the unpacked way, to the bit."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qapbench import Format, NormalFloat, PackedWeight, UserError, kept_rounding, normal_float, packed_tensors
from qapbench.methods.packed import CannotPackError, pack, packed_bytes, packed_on, unpack
from qapbench.spec.run_spec import QuantizeSpec

ROW = [
    {},
    {"zero_point": "clamped"},
    {"zero_point": "free"},
    {"symmetric": True},
    {"symmetric": True, "divisor": "half"},
    {"symmetric": True, "divisor": "full"},
]
MX = ("rceil", "floor", "even", "ceil", "compressed_tensors")
INTEGERS = [
    *(Format(bits=b, group_size=g, **kind) for b in (2, 3, 4, 8) for g in (None, 8, 1) for kind in ROW),
    *(Format(bits=b, granularity=g, symmetric=s) for b in (3, 8) for g in ("channel", "tensor") for s in (True, False)),
]
FLOATS = [
    *(Format(format=name, scale=rule) for name in ("mxfp8", "mxfp4") for rule in MX),
    *(Format(format="nvfp4", scale=rule) for rule in ("tensor", "block", "compressed_tensors")),
    *(
        Format(format="fp8", scale=rule, granularity=shared)
        for rule in ("amax", "compressed_tensors")
        for shared in ("row", "tensor", "block")
    ),
]
SHAPES = [(5, 7), (130, 200), (1, 1), (3, 129)]


@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 70), st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_codes_come_back(bits: int, rows: int, width: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits)
    assert torch.equal(unpack(packed, bits, torch.full_like(codes, 255)), codes)
    if width % 8 == 0:
        assert packed.numel() * 8 == codes.numel() * bits


def weight(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=draw) * torch.rand(shape[0], 1, generator=draw)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("formats", [INTEGERS, FLOATS], ids=["integers", "floats"])
def test_values_are_those_of_the_format(formats: list[Format], dtype: torch.dtype) -> None:
    kinds = (lambda w: w, lambda w: w.abs() + 1, torch.zeros_like)
    cases = itertools.cycle(itertools.product(SHAPES, kinds))  # 12 cases, and no format of a kind meets the same ones
    for format in formats:
        for shape, kind in itertools.islice(cases, 5):
            x = kind(weight(shape, dtype))
            packed = format.packed(x)
            assert packed.shape == shape
            assert torch.equal(packed.dequantized(dtype), format(x)), f"{format} {shape}"
            assert packed.equals(format(x)) and not packed.equals(format(x) + 1)
            assert torch.equal(PackedWeight.from_tensors(packed.tensors())(x), format(x))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4(shape: tuple[int, int], double: bool) -> None:
    w = weight(shape, torch.bfloat16)
    assert torch.equal(NormalFloat(64, double).packed(w).dequantized(w.dtype), normal_float(w, 64, double))


@pytest.mark.parametrize("shape", [(33, 70), (128, 256), (5, 3)])
def test_the_size_of_a_packed_weight_is_known_beforehand(shape: tuple[int, int]) -> None:
    formats: list[dict[str, Any]] = [{"bits": bits, "group_size": 16} for bits in range(2, 9)]
    formats += [{"bits": 4}, {"bits": 8, "symmetric": True}, {"bits": 3, "symmetric": True, "group_size": 32}]
    formats += [{"bits": 4, "granularity": kind} for kind in ("channel", "tensor")]
    formats += [{"format": name} for name in ("fp8", "mxfp8", "mxfp4", "nvfp4")]
    formats += [{"format": "fp8", "granularity": "block", "group_size": 16}, {"format": "fp8", "granularity": "tensor"}]
    for section in formats:
        format = Format.model_validate(section)
        assert packed_bytes(format, *shape) == format.packed(weight(shape, torch.float32)).nbytes, format


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_packed(bad: float) -> None:
    w = weight((4, 16), torch.float32)
    w[1, 2] = bad
    with pytest.raises(CannotPackError):
        Format(bits=4).packed(w)


def test_values_that_are_on_no_level_are_kept_themselves() -> None:
    format, w = Format(bits=4, group_size=8), weight((4, 16), torch.float32)
    grids = [format.levels.of(part) for part in w.split(8, dim=1)]
    with pytest.raises(CannotPackError):
        packed_on(w, grids, format)
    assert torch.equal(kept_rounding(packed_tensors(w, grids, format))(w), w)
    kept = packed_tensors(format(w), grids, format)
    assert set(kept) == {"codes", "code_scale", "layout", "zero"}
    assert torch.equal(kept_rounding(kept)(w), format(w))


def test_a_7b_in_4_bits_takes_less_than_045_of_its_file() -> None:
    """LLaVA-1.5-7B in bfloat16: everything but the decoder's linears stays as it is, also if that is in float32."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32064}
    text |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "image_size": 336}
    vision |= {"num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14, "projection_dim": 768}
    config = AutoConfig.for_model("llava", text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    named = {name: p for name, p in model.named_parameters() if name.endswith("proj.weight")}
    layers = [p for name, p in named.items() if "language_model.layers" in name]
    inside = sum(parameter.numel() for parameter in layers)
    assert 7.0e9 < total < 7.1e9
    assert len(layers) == 32 * 7
    example = Format(bits=4, group_size=128).packed(torch.randn(8, 4096))
    packed = inside * example.nbytes / (8 * 4096)
    assert packed / inside == pytest.approx((4 + 32 / 128 + 8 / 128) / 8)
    assert (packed + 2 * (total - inside)) / (2 * total) < 0.34
    assert (packed + 4 * (total - inside)) / (2 * total) < 0.45


INT8 = {"bits": 8, "symmetric": True}


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"activations": {"bits": 8}}, "no `weights` are quantized"),
        ({"weights": INT8, "activations": INT8, "backend": "torchao"}, "torchao stores its own weights"),
    ],
)
def test_what_cannot_be_packed_is_refused(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"storage: 'packed' stores quantized weights, but {said}"):
        QuantizeSpec.model_validate({"method": "rtn", "storage": "packed", **section})


def test_a_spec_without_the_field_is_as_it_was() -> None:
    section = {"method": "rtn", "weights": {"bits": 4}}
    plain = QuantizeSpec.model_validate({**section, "storage": "unpacked"}).model_dump()
    assert plain == QuantizeSpec.model_validate(section).model_dump()
    assert "storage" not in plain
    assert QuantizeSpec.model_validate({**section, "storage": "packed"}).model_dump()["storage"] == "packed"
    with pytest.raises((ValueError, UserError), match="storage"):
        QuantizeSpec.model_validate({**section, "storage": "pack"})
