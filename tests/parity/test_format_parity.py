"""Numeric formats against what each method's own code, compressed-tensors and torchao make of fixed tensors."""

import pytest
import torch
from parity_vectors import load, needs_vectors
from torch import Tensor

from qapbench import Format

pytestmark = needs_vectors

G128, G64 = {"group_size": 128}, {"group_size": 64}
SYMMETRIC, HALF = {"symmetric": True}, {"symmetric": True, "divisor": "half"}
CLAMPED, FREE = {"zero_point": "clamped"}, {"zero_point": "free"}
CONSTANT = (0, 1, slice(0, 128))  # a group of threes in the conventions' tensor


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "reference, convention",
    [
        ("ct_float32_b{}_asym", {}),
        ("ct_float32_b{}_sym", HALF),
        ("ao_float32_b{}_asym", {}),
        ("ao_float32_b{}_sym", HALF),
        ("awqstyle_fp32_float32_b{}_asym", CLAMPED),
        ("awqstyle_fp32_bfloat16_b{}_asym", CLAMPED),
        ("plain_qmax_float32_b{}_sym", SYMMETRIC),
        ("plain_qmax_bfloat16_b{}_sym", SYMMETRIC),
    ],
)
def test_conventions(reference: str, convention: dict[str, object], bits: int) -> None:
    """The libraries' bfloat16 answers, computed in bfloat16, are not compared: ours is always float32."""
    tensors, _ = load("quant/conventions/group128")
    x = tensors["x_bfloat16" if "bfloat16" in reference else "x_float32"].float()
    got, expected = Format(bits=bits, **G128, **convention)(x), tensors[reference.format(bits)].clone()
    assert (got[CONSTANT] == 3).all(), "a group of one value is exact here"
    expected[CONSTANT] = 3  # AWQ clamps it away; absmax / 7.5 does not reach it
    if reference.startswith("ao") and convention is HALF:
        # absmax / scale is a tie at 7.5, which torchao's product with 1 / scale can miss: one level apart there.
        size = x.abs().unflatten(-1, (-1, 128))
        tie = (size == size.amax(dim=-1, keepdim=True)).flatten(-2)
        got, expected = got[~tie], expected[~tie]
    close(got, expected)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_mbq_primitives(bits: int) -> None:
    tensors, _ = load("quant/mbq/primitives")
    close(Format(bits=bits, **SYMMETRIC)(tensors["w"]), tensors[f"w_ch_sym_b{bits}"])
    close(Format(bits=bits, **SYMMETRIC)(tensors["x"]), tensors[f"a_tok_sym_b{bits}"])
    close(Format(bits=bits, **G128, **CLAMPED)(tensors["w"]), tensors[f"w_g128_asym_b{bits}"])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [-1, 64, 128])
def test_awq_primitive(bits: int, group: int) -> None:
    tensors, _ = load("quant/awq/pseudo_quantize")
    format = Format(bits=bits, group_size=group if group > 0 else None, **CLAMPED)
    close(format(tensors["w"]), tensors[f"dq_b{bits}_g{group}"])


@pytest.mark.parametrize("bits", [4, 8])
def test_smoothquant_primitives(bits: int) -> None:
    tensors, _ = load("quant/smoothquant/absmax_primitives")
    close(Format(bits=bits, **SYMMETRIC)(tensors["w"]), tensors[f"w_ch_b{bits}"])
    close(Format(bits=bits, **SYMMETRIC)(tensors["x"]), tensors[f"act_tok_b{bits}"])
    close(Format(bits=bits, **SYMMETRIC, granularity="tensor")(tensors["x"]), tensors[f"act_tensor_b{bits}"])


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_omniquant_activations(bits: int) -> None:
    tensors, _ = load("quant/omniquant/uniform_affine")
    close(Format(bits=bits, **FREE)(tensors["x"]), tensors[f"act_token_asym_b{bits}"])


def test_qvlm_activations() -> None:
    tensors, _ = load("quant/qvlm/act_primitive_a4")
    channel, token = Format(bits=4, granularity="channel", **FREE), Format(bits=4, **FREE)
    close(channel(tensors["x"]), tensors["dq_per_channel"])
    close(token(tensors["x"]), tensors["dq_per_row"])
    fixed = channel.levels.grid(tensors["range_min_clip"], tensors["range_max_clip"])
    close(fixed(tensors["x"]), tensors["dq_per_channel_clip"])
