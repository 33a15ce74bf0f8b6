"""AutoRound: its steps against signed descent by hand in float64, and what it learns."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qapbench import Format, UserError, ptqs
from qapbench.strategies.ptq.signed_descent import tune
from qapbench.strategies.ptq.signed_levels import rounded


def by_hand(w: np.ndarray, x: np.ndarray, group: int, bits: int, steps: int) -> tuple[list[float], np.ndarray]:
    """Losses and the best weight of symmetric tuning of one linear, with gradients written out (straight-through)."""
    top, shape = 2 ** (bits - 1), (len(w), -1, group)
    w, gram = w.reshape(shape), x.T @ x
    v, low, high = np.zeros_like(w), np.ones(w.shape[:2]), np.ones(w.shape[:2])
    least, most = np.minimum(w.min(-1), 0), np.maximum(w.max(-1), 0)
    losses, best = [], w
    for step in range(steps):
        lower = most * high < -least * low
        slope = np.where(lower, -least, -most) / top
        scale = (slope * np.where(lower, low, high))[..., None]
        free = np.round(w / scale + v)
        levels = np.clip(free, -top, top - 1)
        inside = (free >= -top) & (free <= top - 1)
        off = (scale * levels - w).reshape(len(w), -1)
        losses.append(float(((off @ gram) * off).sum()))
        if losses[-1] == min(losses):
            best = (scale * levels).reshape(len(w), -1)
        toward = (2 * off @ gram).reshape(shape)
        of_scale = (toward * (levels - inside * (w / scale))).sum(-1) * slope
        rate = (1 - step / steps) / steps
        v = v - rate * np.sign(toward * scale * inside)
        low = np.clip(low - rate * np.sign(of_scale * lower), 0, 1)
        high = np.clip(high - rate * np.sign(of_scale * ~lower), 0, 1)
    return losses, best


@pytest.mark.parametrize("bits, group", [(4, 16), (2, 8), (3, 32)])
def test_steps_are_those_of_signed_descent(bits: int, group: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    w, mix = torch.randn(6, 32, generator=draw), torch.randn(6, 32, generator=draw)
    x = torch.randn(50, 6, generator=draw) @ mix + 0.2 * torch.randn(50, 32, generator=draw)
    losses: list[float] = []

    def error(new: dict[str, Tensor], batch: list[int]) -> Tensor:
        loss = ((new["w"] - w) @ x.T).square().sum()
        losses.append(float(loss.detach()))
        return loss

    format = Format(bits=bits, symmetric=True, group_size=group)
    found = tune({"w": w}, format, error, itertools.repeat([0], 25), 25)["w"]  # type: ignore[arg-type]
    wanted, best = by_hand(w.double().numpy(), x.double().numpy(), group, bits, 25)
    np.testing.assert_allclose(losses, wanted, rtol=1e-3)
    assert (np.abs(found.numpy() - best) > 1e-4).mean() < 0.02
    assert min(losses) < 0.9 * losses[0]


def test_levels_have_a_signed_scale() -> None:
    """The end with the larger magnitude is -8 scales of 4-bit levels; zero is a level of asymmetric ones."""
    ends = torch.ones(4, 1)
    w = torch.tensor([[0.8, -0.1, 0.35], [-0.8, 0.1, 0.6], [0.0, 0, 0], [0.5, 0.5, 0.5]])
    out = rounded(w, Format(bits=4, symmetric=True), torch.zeros_like(w), ends, ends)
    wanted = [[0.8, -0.1, 0.4], [-0.8, 0.1, 0.6], [0, 0, 0], [0.5, 0.5, 0.5]]
    np.testing.assert_allclose(out.numpy(), wanted, atol=1e-6)
    out = rounded(w + 1, Format(bits=2), torch.zeros_like(w), ends, ends)
    np.testing.assert_allclose(out.numpy()[2], [1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(out.numpy()[0] / (1.8 / 3), np.round(out.numpy()[0] / (1.8 / 3)), atol=1e-5)


@pytest.mark.parametrize("activations", [None, Format(bits=4)])
def test_it_beats_rounding_to_nearest(activations: Format | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 12)).requires_grad_(False)
    linears = {"0": model[0], "2": model[2]}
    samples = [torch.randn(20, 32) * torch.logspace(0, -2, 32) for _ in range(6)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    off = {}
    for name, more in (("rtn", {}), ("autoround", {"iters": 40}), ("again", {"iters": 40})):
        method = ptqs.create("autoround" if more else "rtn", **more)
        plans = method.prepare(model, linears, Format(bits=3), activations, samples)
        hidden = nn.functional.gelu(
            nn.functional.linear(
                plans["0"].new_input(torch.cat(samples)), plans["0"].new_weight(model[0].weight), model[0].bias
            )
        )
        out = nn.functional.linear(plans["2"].new_input(hidden), plans["2"].new_weight(model[2].weight), model[2].bias)
        off[name] = float((out - model(torch.cat(samples))).square().mean())
    assert off["autoround"] < 0.8 * off["rtn"]
    assert off["again"] == off["autoround"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_it_cannot_make() -> None:
    for format in (Format(bits=4, symmetric=True, divisor="half"), Format(format="mxfp4")):
        with pytest.raises(UserError, match="weights"):
            ptqs.create("autoround").check(format, None)
