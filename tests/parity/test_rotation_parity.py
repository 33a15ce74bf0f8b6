"""Learned rotations and affine transforms against what the released codes of SpinQuant and FlatQuant answer."""

import pytest
import torch
from parity_vectors import load, needs_vectors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qapbench import Format, Rotated, RotatedBoth, Rotation, kept_rounding
from qapbench.methods.kronecker import Kronecker, KroneckerHeads, LearnedMatrix, Matrix, near_square
from qapbench.methods.stiefel import cayley_step
from qapbench.strategies.ptq.clipped_levels import ClippedInput, clip_rounded
from qapbench.strategies.ptq.mquant import MQuant

pytestmark = needs_vectors
W4 = Format(bits=4, symmetric=True)
LAYER = "model.layers.0."


def close(got: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def test_steps_of_spinquant() -> None:
    tensors, about = load("quant/spinquant/sgdg_a")
    for step in range(3):
        start = tensors[f"out.p{step}" if step else "in.p0"]
        moved = cayley_step(start, tensors[f"in.grad{step}"], about["params"]["lr"])
        close(moved, tensors[f"out.p{step + 1}"], 1e-6)


def spinquant_transforms(tensors: dict[str, Tensor]) -> dict[str, Rotated]:
    """The transform of each linear for the R1 and R2 of a case."""
    r1, r2 = (Rotation.dense(tensors[f"in.{name}"].mT) for name in ("R1", "R2"))
    r4 = Rotation.hadamard(64, 0, signs=False)
    before, behind = (tensors[f"in.{LAYER}{name}.weight"] for name in ("input_layernorm", "post_attention_layernorm"))
    return {
        **{f"self_attn.{name}": Rotated(r1, before) for name in ("q_proj", "k_proj")},
        "self_attn.v_proj": RotatedBoth(r1, r2, gain=before),
        "self_attn.o_proj": RotatedBoth(r2, r1),
        **{f"mlp.{name}": Rotated(r1, behind) for name in ("gate_proj", "up_proj")},
        "mlp.down_proj": RotatedBoth(r4, r1),
    }


def test_weights_of_spinquant() -> None:
    """Rotated, and rounded to nearest in clipped ranges."""
    tensors, _ = load("quant/spinquant/rotate_model_a")
    rounder, moved = MQuant(rounding="rtn"), 0.0
    for name, turned in spinquant_transforms(tensors).items():
        weight, expected = (tensors[f"{side}.{LAYER}{name}.weight"] for side in ("in", "out"))
        close(turned.weight(weight), expected)
        rounded = kept_rounding(rounder.rounded(expected, None, W4))(weight)
        apart = (rounded - tensors[f"out.rtn_w4.{LAYER}{name}.weight"]).abs()
        assert (apart > 1e-5).float().mean() < 0.005, "more than a tie here and there"
        moved += float(apart.mean())
    assert moved < 1e-3


def test_logits_of_spinquant() -> None:
    """The released model computes what ours does from its centred embeddings, with nothing rotated but linears."""
    tensors, about = load("quant/spinquant/rotate_model_a")
    sizes = about["params"]
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["intermediate"],
        num_hidden_layers=1,
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        rms_norm_eps=sizes["rms_eps"],
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    model.load_state_dict(
        {key.removeprefix("in."): w for key, w in tensors.items() if key.endswith("weight") and key[:3] == "in."}
    )
    close(model(tensors["in.input_ids"]).logits, tensors["mid.logits_original"])
    embeddings = model.model.embed_tokens.weight.data
    embeddings -= embeddings.mean(dim=1, keepdim=True)
    close(model(tensors["in.input_ids"]).logits, tensors["mid.logits_after_fuse"])
    for name, turned in spinquant_transforms(tensors).items():
        linear = model.get_submodule(LAYER + name)
        linear.weight.data = turned.weight(linear.weight)
        linear.register_forward_pre_hook(lambda _, args, turned=turned: (turned.input(args[0]),))
        if turned.output is not None:
            linear.register_forward_hook(lambda _, args, y, turned=turned: turned.output(y))
    close(model(tensors["in.input_ids"]).logits, tensors["mid.logits_rotated"], 2e-5)


def matrix_of(tensors: dict[str, Tensor], name: str) -> Matrix:
    """A matrix with the transpose of its inverse, which the released code calls the inverse."""
    value = tensors[f"in.{name}"]
    return Matrix(value, torch.linalg.inv(value.double()).mT.float())


def test_maps_of_flatquant() -> None:
    tensors, about = load("quant/flatquant/kronecker_a")
    assert near_square(about["params"]["n"]) == (about["params"]["left"], about["params"]["right"])
    x, w, one = tensors["in.x"], tensors["in.w"], torch.ones(32)
    plain = Kronecker(matrix_of(tensors, "hadL"), matrix_of(tensors, "hadR"), one)
    close(plain.input(x), tensors["out.kronecker_matmul"])
    sides = []
    for side in ("left", "right"):
        u, v, s = (tensors[f"in.svd.linear_{part}_{side}"] for part in ("u", "v", "diag"))
        learned = LearnedMatrix(len(s), torch.Generator())
        learned.start, learned.parameters[1] = torch.stack([u, v]).double(), s
        sides.append(learned.matrix())
        close(sides[-1].value, tensors[f"mid.svd.matrix_{side}"])
        close(sides[-1].dual, tensors[f"mid.svd.matrix_{side}_inv"])
    turned = Kronecker(sides[0], sides[1], tensors["in.svd.diag_scale"])
    close(turned.input(x), tensors["out.svd.x"])
    close(turned.weight(w), tensors["out.svd.w_inv_t"])
    close(turned.input(x) @ turned.weight(w).mT, tensors["out.svd.y"], 5e-5)
    turned = Kronecker(matrix_of(tensors, "inv.left"), matrix_of(tensors, "inv.right"), tensors["in.inv.diag_scale"])
    close(turned.input(x), tensors["out.inv.x"], 2e-5)
    close(turned.weight(w), tensors["out.inv.w_inv_t"], 2e-5)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantizers_of_flatquant(bits: int, symmetric: bool) -> None:
    tensors, _ = load("quant/flatquant/quantizers_a")
    case, format = f"{bits}.{'sym' if symmetric else 'asym'}", Format(bits=bits, symmetric=symmetric)
    high, low = tensors[f"in.a{case}.lac.max_min"]
    close(ClippedInput(format, low, high)(tensors["in.x"]), tensors[f"out.a{case}.lac.dq"])
    whole, w = torch.full((2, 8, 1, 1), 50.0), tensors["in.w"]
    close(clip_rounded(w, whole, format, lambda rows: rows)[0], tensors[f"out.w{case}.dq"])


@pytest.mark.parametrize("case", ["sym", "asym", "out_trans"])
def test_linear_of_flatquant(case: str) -> None:
    """Mapped, cut, mapped by heads and rounded, on both sides, as in the released training."""
    tensors, _ = load("quant/flatquant/quantized_linear_a")
    left, right, head = (matrix_of(tensors, name) for name in ("matrix_left", "matrix_right", "out_matrix"))
    weight, bias, scale = tensors["in.weight"], tensors["in.bias"], tensors["in.diag_scale"]
    turned = Kronecker(left, right, scale)
    if case == "out_trans":
        turned = KroneckerHeads(left, right, scale, head, bias)
    shares = {name: tensors[f"in.{case}.clip_factor_{name}"] for name in ("w_max", "w_min", "a_max", "a_min")}
    cut = torch.stack([shares["w_min"], shares["w_max"]]).unsqueeze(-1)
    format = Format(bits=4, symmetric=case != "asym")
    read = ClippedInput(format, shares["a_min"], shares["a_max"])(turned.input(tensors["in.x"]))
    close(read, tensors[f"mid.{case}.x_fq"])
    rounded, _ = clip_rounded(Kronecker.weight(turned, weight), cut, format, turned.rows)
    if isinstance(turned, KroneckerHeads):  # the release answers with mapped heads
        bias = turned.rows(bias[:, None])[:, 0]
    close(read @ rounded.mT + bias, tensors[f"out.{case}.y_train"])
