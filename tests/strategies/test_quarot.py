"""QuaRot: rotations against dense matrices in float64, models that stay the same, outliers that rotation spreads."""

import contextlib

import numpy as np
import pytest
import torch
from torch import nn

from qapbench import Calibration, CalibrationSamples, Format, LinearPlan, installed_all, ptqs
from qapbench.models.family import families, family_of

W4, A4 = Format(bits=4, symmetric=True), Format(bits=4, symmetric=True)


class Norm(nn.Module):
    """An RMSNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * self.weight


def hadamard(size: int) -> np.ndarray:
    """Sylvester's, orthonormal."""
    h = np.ones((1, 1))
    while len(h) < size:
        h = np.block([[h, h], [h, -h]])
    return h / np.sqrt(size)


def test_rotations_are_the_dense_ones() -> None:
    """Behind a norm W diag(g) S H, elsewhere S H W H; what is undone gives the linear back."""
    torch.manual_seed(0)
    model = nn.Sequential(Norm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).requires_grad_(False)
    linears = {"1": model[1], "3": model[3]}
    samples = [torch.randn(9, 16) for _ in range(3)]
    plans = ptqs.create("quarot").prepare(model, linears, W4, None, samples)
    gain, turn = model[0].weight.double().numpy(), plans["1"].transform
    assert turn is not None
    q = np.diag(turn.ins.signs.double().numpy()) @ hadamard(16)  # type: ignore[attr-defined]
    w, x = model[1].weight.double().numpy(), torch.randn(5, 16)
    np.testing.assert_allclose(turn.weight(model[1].weight).numpy(), (w * gain) @ q, atol=1e-6)
    np.testing.assert_allclose(turn.input(x).numpy(), (x.double().numpy() / gain) @ q, atol=1e-6)
    assert turn.output is None
    turn = plans["3"].transform
    assert turn is not None
    assert turn.output is not None
    out = np.diag(turn.outs.signs.double().numpy()) @ hadamard(16)  # type: ignore[attr-defined]
    w = model[3].weight.double().numpy()
    np.testing.assert_allclose(turn.weight(model[3].weight).numpy(), out.T @ w @ hadamard(32), atol=1e-6)
    y, bias = torch.randn(5, 16), model[3].bias.double().numpy()
    np.testing.assert_allclose(turn.output(y).numpy(), (y.double().numpy() - bias) @ out.T + bias, atol=1e-6)


@pytest.mark.parametrize("method", ["quarot", "spinquant"])
@pytest.mark.parametrize("family", families.names())
def test_every_family_stays_the_same(family: str, method: str) -> None:
    """All linears rotated and none rounded: the logits are those of the model, and values are turned by heads."""
    torch.manual_seed(0)
    model, inputs = families.create(family).tiny()
    owner = family_of(model)
    linears = owner.linears(["language"])
    norms = [p for name, p in model.named_parameters() if "norm" in name and "language" in name]
    zero = "Gemma" in type(model).__name__  # its norms hold the gain less one
    for parameter in norms:
        parameter.data.uniform_(-0.5, 0.5).sub_(0 if zero else -1)
        parameter.data[0] = 0  # a gain of 1 there, a dead channel elsewhere
    with torch.no_grad():
        plain = model(**inputs).logits
        labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 5, -100)
        calibration = Calibration(model, CalibrationSamples([{**inputs, "labels": labels}]), owner)
        params = {"steps": 2} if method == "spinquant" else {}
        plans = ptqs.create(method, rounding="rtn", **params).prepare(model, linears, W4, W4, calibration)
        with contextlib.ExitStack() as stack:
            for name, linear in linears.items():
                assert plans[name].transform is not None
                stack.enter_context(installed_all({name: linear}, LinearPlan(transform=plans[name].transform)))
            turned = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, plain)
    torch.testing.assert_close(turned, plain, rtol=0, atol=2e-4)
    kinds = {name.rpartition(".")[2]: plans[name].transform for name in linears}
    head = next(
        m for m in model.modules() if hasattr(m, "v_proj") and hasattr(m, "head_dim") and m.v_proj in linears.values()
    ).head_dim
    assert len(kinds["v_proj"].outs.signs) == head  # type: ignore[union-attr]
    assert kinds["q_proj"].gain is not None  # type: ignore[union-attr]
    assert kinds["down_proj"].gain is None  # type: ignore[union-attr]
    if method == "spinquant":
        assert kinds["o_proj"].ins.width == head  # type: ignore[union-attr]


@pytest.mark.parametrize("rounding", ["gptq", "rtn"])
def test_outliers_do_less_harm(rounding: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Norm(64), nn.Linear(64, 48)).requires_grad_(False)
    model[0].weight[3] = 30
    samples = [torch.randn(30, 64) for _ in range(4)]
    x = torch.cat(samples)
    wanted, off = model(x), {}
    for name, more in (("rtn", {}), ("quarot", {"rounding": rounding})):
        plan = ptqs.create(name, **more).prepare(model, {"1": model[1]}, W4, A4, samples)["1"]
        out = nn.functional.linear(plan.new_input(model[0](x)), plan.new_weight(model[1].weight), model[1].bias)
        off[name] = float((out - wanted).square().mean())
    assert off["quarot"] < off["rtn"] / 2
