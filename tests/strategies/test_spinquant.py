"""SpinQuant: steps on the Stiefel manifold against dense float64, and what learned rotations are good for."""

import contextlib

import numpy as np
import torch
from test_quarot import A4, W4, Norm
from torch import nn

from qapbench import AnswerLoss, Calibration, CalibrationSamples, LinearPlan, installed_all, ptqs
from qapbench.methods.stiefel import cayley_step, descend, nearest_orthogonal
from qapbench.models.family import families, family_of


def orthogonal(size: int, seed: int) -> torch.Tensor:
    return nearest_orthogonal(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)))


def test_a_small_step_is_the_cayley_transform() -> None:
    """Started at X^T - s G^T the fixed point tends to (I - s W / 2)^-1 (I + s W / 2) X^T."""
    point, gradient = orthogonal(12, 0), torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
    for rate in (1e-3, 1e-2):
        x, g = point.double().numpy(), gradient.double().numpy()
        a = -g.T @ x + x.T @ (x @ g.T @ x) / 2
        w = a - a.T
        step = min(rate, 1 / np.abs(w).sum(axis=0).max())
        exact = np.linalg.solve(np.eye(12) - step / 2 * w, (np.eye(12) + step / 2 * w) @ x.T).T
        moved = cayley_step(point, gradient, rate).double().numpy()
        np.testing.assert_allclose(moved, exact, atol=3e-5)
        np.testing.assert_allclose(exact @ exact.T, np.eye(12), atol=1e-6)
        assert ((moved - x) * g).sum() < 0, "against the gradient"


def test_descent_finds_a_rotation() -> None:
    """The rotation that turns one set of points into another, from a start that lies on its side of the group."""
    wanted, x = orthogonal(6, 3), torch.randn(40, 6, generator=torch.Generator().manual_seed(4))
    start = {"r": nearest_orthogonal(wanted + 0.3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(5)))}

    def losses(points, step):  # type: ignore[no-untyped-def]
        yield (x @ points["r"] - x @ wanted).square().sum()
        yield 3 * (x @ points["r"] - x @ wanted).square().sum()

    found = descend(start, losses, 80, 0.02)["r"]
    assert not found.requires_grad
    torch.testing.assert_close(found.double() @ found.double().mT, torch.eye(6, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (found - wanted).norm() < 0.1 * (start["r"] - wanted).norm()


def test_learned_rotations_do_better_than_drawn_ones() -> None:
    """Outliers in two channels, which a Hadamard transform spreads and a learned rotation spreads better."""
    torch.manual_seed(1)
    model = nn.Sequential(Norm(32), nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 32)).requires_grad_(False)
    model[0].weight[3], model[0].weight[9] = 20, -9
    mix = torch.eye(32) + 0.3 * torch.randn(32, 32)
    samples = [torch.randn(30, 32) @ mix for _ in range(4)]
    x, linears, off = torch.cat(samples), {"1": model[1], "3": model[3]}, {}
    wanted = model(x)
    for steps in (0, 40):
        method = ptqs.create("spinquant", rounding="rtn", steps=steps, lr=0.5, batch=4)
        plans = method.prepare(model, linears, W4, A4, samples)
        with contextlib.ExitStack() as stack:
            for name, linear in linears.items():
                stack.enter_context(installed_all({name: linear}, plans[name]))
            off[steps] = float((model(x) - wanted).square().mean())
        assert torch.equal(model(x), wanted)
    assert off[40] < 0.93 * off[0]


def test_the_loss_is_that_of_the_model() -> None:
    """Cross-entropy of the answer's tokens as transformers computes it; what linears hold and read can be replaced."""
    torch.manual_seed(0)
    model, inputs = families.create("llava").tiny()
    owner = family_of(model)
    linears = owner.linears(["language"])
    labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 6, -100)
    calibration = Calibration(model, CalibrationSamples([{**inputs, "labels": labels}, inputs]), owner)
    loss, name = AnswerLoss(calibration, linears), next(iter(linears))
    assert len(loss) == 2
    with torch.no_grad():
        torch.testing.assert_close(loss(0), model(**inputs, labels=labels).loss)
        assert loss(1) == 0
        changed = loss(0, {name: linears[name].weight * 2})
        torch.testing.assert_close(loss(0, inputs={name: lambda x: 2 * x}), changed)
        assert loss(1, {name: linears[name].weight * 2}) > 0
        with installed_all({name: linears[name]}, LinearPlan(weight=lambda w: 2 * w)):
            torch.testing.assert_close(model(**inputs, labels=labels).loss, changed)
