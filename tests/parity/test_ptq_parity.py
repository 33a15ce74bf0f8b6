"""Methods against what their own code answers: learned clipping, NF4 with and without quantized scales."""

import pytest
import torch
from parity_vectors import load, needs_vectors

from qapbench import Format, normal_float
from qapbench.methods.normal_float import nf4_levels
from qapbench.strategies.ptq.omniquant import CLIP, clip_quantize

pytestmark = needs_vectors


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [None, 64, 128])
def test_omniquant_learned_clipping(bits: int, group: int | None) -> None:
    tensors, _ = load("quant/omniquant/uniform_affine")
    w, case = tensors["w"], f"b{bits}_g{group}"
    format = Format(bits=bits, group_size=group, zero_point="free")
    high, low = (tensors[f"{end}_{case}"].view(len(w), -1) for end in ("up", "low"))
    start = torch.full_like(high, CLIP)
    torch.testing.assert_close(clip_quantize(w, start, start, format), tensors[f"w_lwc_init_{case}"], rtol=0, atol=1e-5)
    torch.testing.assert_close(clip_quantize(w, high, low, format), tensors[f"w_lwc_{case}"], rtol=0, atol=1e-5)


def test_nf4() -> None:
    tensors, _ = load("quant/qvlm/weight_nf4")
    assert torch.equal(nf4_levels(), tensors["code"])
    assert torch.equal(normal_float(tensors["W"], double=False), tensors["dq_nodq"])


def test_nf4_with_quantized_scales() -> None:
    """Equal but for blocks whose scale lies midway between two of the 8-bit levels: one of 1,024 here."""
    tensors, _ = load("quant/qvlm/weight_nf4")
    got, expected = (w.float().view(-1, 64) for w in (normal_float(tensors["W"]), tensors["dq_double"]))
    apart = (got - expected).abs().amax(dim=1)
    assert (apart > 1e-5).sum() <= 1
    assert apart.max() < 1e-3
