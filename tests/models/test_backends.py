"""Real int8 kernels in place of the simulation, where torchao is installed."""

from typing import Any

import pytest
import torch
from torch import nn

from qapbench import Format, LinearPlan, Scaling, UserError, compress
from qapbench.quantize.backends import int8_linear
from qapbench.quantize.receipts import LinearReceipt

INT8 = {"bits": 8, "symmetric": True}


def test_int8_is_integer_arithmetic(model: Any) -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32).requires_grad_(False), torch.randn(5, 64)
    original = linear.weight
    scale = torch.rand(64) + 0.5
    line = LinearReceipt(name="l", part="language", shape=(32, 64))
    plan = LinearPlan(Format(**INT8), Format(**INT8), Scaling(scale))
    with int8_linear(linear, plan, line):
        out = linear(x)

    def codes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """torchao's symmetric int8: absmax over 127.5, levels -128 .. 127."""
        step = values.double().abs().amax(dim=1, keepdim=True) / 127.5
        return (values.double() / step).round().clamp(-128, 127), step

    (q_x, s_x), (q_w, s_w) = codes(x / scale), codes(linear.weight * scale)
    wanted = (q_x @ q_w.T) * s_x * s_w.T + linear.bias
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=2e-2)
    assert (out.double() - wanted).norm() < 1e-3 * wanted.norm()
    assert (line.weight_bits, line.activation_bits, line.calls) == (8, 8, 1)
    assert linear.weight is original


@pytest.mark.parametrize("method", ["rtn", "smoothquant"])
def test_the_receipt_says_what_ran(method: str, model: Any, one: dict[str, Any]) -> None:
    pytest.importorskip("torchao")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    spec = {"method": method, "weights": INT8, "activations": INT8}
    outputs = {}
    for backend in ("simulate", "torchao"):
        with compress(model, {"quantize": {**spec, "backend": backend}}, calibration=[one]) as receipt, torch.no_grad():
            outputs[backend] = model(**one).logits
        receipt.check()
        assert receipt.backend is not None
        assert receipt.backend.startswith("torchao" if backend == "torchao" else "simulation")
        assert {(line.weight_bits, line.activation_bits) for line in receipt.linears} == {(8, 8)}
    assert not torch.equal(outputs["simulate"], outputs["torchao"])
    assert (outputs["simulate"] - outputs["torchao"]).norm() < 0.1 * outputs["simulate"].norm()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_it_cannot_run_is_refused(model: Any, one: dict[str, Any]) -> None:
    pytest.importorskip("torchao")
    spec = {"method": "gptq", "weights": INT8, "activations": INT8, "backend": "torchao"}
    with (
        pytest.raises(UserError, match=r"quantize.backend: torchao cannot run"),
        compress(model, {"quantize": spec}, calibration=[one]),
    ):
        pass
    with (
        pytest.raises(UserError, match="only simulation"),
        compress(model, {"quantize": {"method": "rtn", "weights": {"bits": 4}, "backend": "torchao"}}),
    ):
        pass
