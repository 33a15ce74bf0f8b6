"""PTQ methods against their own public code; see test_parity."""

import pytest
import torch
from parity_vectors import load, needs_vectors

from qapbench import Format, fake_quantize
from qapbench.strategies.ptq.llm_int8 import Mixed, int8_rows

pytestmark = needs_vectors


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_llm_int8_is_bitsandbytes(threshold: float) -> None:
    """Codes and scales to the bit; outputs up to the order of summation (they also round the input to float16)."""
    tensors, _about = load("quant/llm_int8/linear_float32")
    weight, x = int8_rows(tensors["W"]), tensors["x"]
    theirs = tensors["CB"].float() * (tensors["SCB"].unsqueeze(1) / 127)
    torch.testing.assert_close(weight, theirs, rtol=0, atol=1e-7)
    mixed = Mixed(threshold)
    seen = mixed(x)
    out, wanted = seen @ weight.T + tensors["b"], tensors[f"y_th{threshold}"]
    assert (out - wanted).norm() < 2e-5 * wanted.norm()
    torch.testing.assert_close(out, wanted, rtol=0, atol=2e-4)
    assert mixed.exact is not None
    exact = mixed.exact.expand(x.shape)[0]
    if threshold:
        assert torch.equal(exact.any(dim=0).nonzero().flatten(), tensors["x_outlier_cols"])
        codes = tensors["x_q"].float() * (tensors["x_absmax"].unsqueeze(1) / 127)
        torch.testing.assert_close(seen[0].masked_fill(exact, 0), codes, rtol=0, atol=1e-6)


@pytest.mark.parametrize("group_size", [None, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_awq_rounds_as_its_code_where_groups_have_both_signs(bits: int, group_size: int | None) -> None:
    tensors, _about = load("quant/awq/pseudo_quantize")
    w = tensors["w"]
    groups = w.unflatten(1, (-1, group_size or w.shape[1]))
    assert (groups.amin(-1) < 0).all()
    assert (groups.amax(-1) > 0).all()
    ours = fake_quantize(w, bits, group_size)
    assert torch.equal(ours, Format(bits=bits, group_size=group_size)(w))
    torch.testing.assert_close(ours, tensors[f"dq_b{bits}_g{group_size or -1}"], rtol=0, atol=1e-5)
