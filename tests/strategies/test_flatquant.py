"""FlatQuant: maps that undo themselves in float64, families that stay the same, and what learning is good for."""

import contextlib

import pytest
import torch
from test_quarot import A4, W4, Norm
from torch import nn

from qapbench import Calibration, CalibrationSamples, LinearPlan, installed_all, near_square, ptqs
from qapbench.methods.kronecker import KroneckerHeads, LearnedMatrix, Matrix
from qapbench.models.family import families, family_of


def test_factors_of_a_width() -> None:
    wanted = {1: (1, 1), 7: (1, 7), 12: (2, 6), 32: (4, 8), 48: (6, 8), 50: (5, 10), 64: (8, 8), 192: (12, 16)}
    assert {width: near_square(width) for width in wanted} == wanted


def moved(size: int, seed: int) -> Matrix:
    """A learned matrix away from its start, in float64."""
    draw = torch.Generator().manual_seed(seed)
    learned = LearnedMatrix(size, draw)
    learned.parameters = [torch.randn(p.shape, generator=draw) * 0.3 + (p.ndim == 1) for p in learned.parameters]
    return learned.matrix(torch.float64)


def test_a_matrix_has_its_inverse() -> None:
    for size in (1, 2, 6, 16):
        matrix = moved(size, size)
        torch.testing.assert_close(
            matrix.value @ matrix.dual.mT, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12
        )


def test_maps_are_the_dense_ones_and_undo_themselves() -> None:
    left, right, head = moved(4, 0), moved(6, 1), moved(5, 2)
    draw = torch.Generator().manual_seed(3)
    scale, bias = torch.rand(24, generator=draw) + 0.5, torch.randn(20, generator=draw)
    w, x = torch.randn(20, 24, generator=draw), torch.randn(3, 7, 24, generator=draw)
    turned = KroneckerHeads(
        *(Matrix(m.value.float(), m.dual.float()) for m in (left, right)),
        scale,
        Matrix(head.value.float(), head.dual.float()),
        bias,
    )
    dense = torch.kron(left.value, right.value)
    torch.testing.assert_close(turned.input(x).double(), (x * scale).double() @ dense, rtol=0, atol=1e-4)
    heads = torch.block_diag(*[head.value] * 4)
    wanted = heads.mT @ (w / scale).double() @ torch.linalg.inv(dense).mT
    torch.testing.assert_close(turned.weight(w).double(), wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(turned.rows_undone(turned.rows(w)), w, rtol=0, atol=1e-4)
    y = turned.output(turned.input(x) @ turned.weight(w).mT + bias)
    torch.testing.assert_close(y, x @ w.mT + bias, rtol=0, atol=2e-4)
    assert torch.equal(turned.input(x)[1:2, 3:4], turned.input(x[1:2, 3:4])), "a token depends on its neighbours"


@pytest.mark.parametrize("family", families.names())
def test_every_family_stays_the_same(family: str) -> None:
    """All linears mapped and none rounded: the logits are those of the model."""
    torch.manual_seed(0)
    model, inputs = families.create(family).tiny()
    owner = family_of(model)
    linears = owner.linears(["language"])
    with torch.no_grad():
        plain = model(**inputs).logits
        calibration = Calibration(model, CalibrationSamples([inputs]), owner)
        plans = ptqs.create("flatquant", epochs=1).prepare(model, linears, W4, A4, calibration)
        with contextlib.ExitStack() as stack:
            for name, linear in linears.items():
                assert plans[name].transform is not None
                stack.enter_context(installed_all({name: linear}, LinearPlan(transform=plans[name].transform)))
            changed = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, plain)
    torch.testing.assert_close(changed, plain, rtol=0, atol=2e-4)
    kinds = {name.rpartition(".")[2]: plans[name].transform for name in linears}
    assert isinstance(kinds["v_proj"], KroneckerHeads)
    assert torch.equal(kinds["o_proj"].right.value, kinds["v_proj"].head.value)  # type: ignore[union-attr]
    assert kinds["q_proj"].left.value.equal(kinds["v_proj"].left.value)  # type: ignore[union-attr]


def test_learning_lowers_the_error() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Norm(32), nn.Linear(32, 24), nn.SiLU(), nn.Linear(24, 16)).requires_grad_(False)
    model[0].weight[3] = 30
    mix = torch.eye(32) + 0.3 * torch.randn(32, 32)
    samples = [torch.randn(20, 32) @ mix for _ in range(4)]
    x, linears = torch.cat(samples), {"1": model[1], "3": model[3]}
    wanted = model(x)

    def error(method: str, **params: int) -> float:
        plans = ptqs.create(method, **params).prepare(model, linears, W4, A4, samples)
        with contextlib.ExitStack() as stack:
            for name, linear in linears.items():
                stack.enter_context(installed_all({name: linear}, plans[name]))
            return float((model(x) - wanted).square().mean())

    learned, start, nearest = error("flatquant", batch=1), error("flatquant", epochs=0), error("rtn")
    assert learned < 0.8 * start
    assert learned < 0.5 * nearest
    assert all(p.grad is None for p in model.parameters())


def test_the_scale_starts_from_the_largest_weights_and_inputs() -> None:
    torch.manual_seed(0)
    model, inputs = families.create("llava").tiny()
    owner = family_of(model)
    linears = owner.linears(["language"])
    name = next(iter(linears))  # the first block reads what it reads in full precision
    read: list[torch.Tensor] = []
    handle = linears[name].register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        model(**inputs)
        handle.remove()
        calibration = Calibration(model, CalibrationSamples([inputs]), owner)
        method = ptqs.create("flatquant", epochs=0, alpha=0.25)
        found = method.calibrate(calibration, linears, W4, A4)[name]["scale"]
    same = [one for key, one in linears.items() if key.rpartition(".")[0] == name.rpartition(".")[0]][:3]  # q, k and v
    weight = torch.stack([one.weight.detach().double().abs().amax(dim=0) for one in same]).amax(dim=0)
    largest = read[0].double().abs().amax(dim=(0, 1))
    torch.testing.assert_close(found.double(), weight**0.75 / largest**0.25, rtol=1e-5, atol=0)
