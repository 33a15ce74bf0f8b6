"""What every post-training quantization method owes to a model's linears."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qapbench import PTQ, Format, LinearPlan, UserError, ptqs

each_ptq = pytest.mark.parametrize("name", ptqs.names())

# Methods whose weights may leave a plain grid of 2^bits levels a group, each with its reason.
OFF_GRID: dict[str, str] = {}

FORMATS = [
    Format(bits=4),
    Format(bits=3, group_size=32),
    Format(bits=4, group_size=40),  # does not divide 96
    Format(bits=4, group_size=32, symmetric=True),
    Format(bits=2, symmetric=True),
    Format(bits=8, symmetric=True),
]


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 40), nn.GELU(), nn.Linear(40, 24, bias=False)).to(dtype)


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


# Less of what only takes longer.
QUICK: dict[str, dict[str, Any]] = {
    "omniquant": {"epochs": 1},
    "autoround": {"iters": 3},
    "spinquant": {"steps": 2},
    "flatquant": {"epochs": 1},
}


def method(name: str) -> PTQ:
    return ptqs.create(name, **QUICK.get(name, {}))


def plan(name: str, model: nn.Module, weights: Format | None, activations: Format | None) -> dict[str, LinearPlan]:
    draw = torch.Generator().manual_seed(1)
    samples = [torch.randn(5, 96, generator=draw) for _ in range(4)]
    return method(name).prepare(model, linears_of(model), weights, activations, samples)


def need(name: str, weights: Format | None, activations: Format | None) -> None:
    """Skip where the method does not make these formats; that it says so readably is tested on a whole model."""
    try:
        ptqs.create(name).check(weights, activations)
    except UserError as error:
        pytest.skip(str(error))


def made_by(name: str) -> tuple[Format, Format]:
    """Formats of weights and activations that the method makes: its own, or the first on both sides."""
    if (own := ptqs.create(name).formats) is not None:
        weights, activations = own
        assert weights is not None
        assert activations is not None
        return weights, activations
    for format in FORMATS:
        with contextlib.suppress(UserError):
            ptqs.create(name).check(format, format)
            return format, format
    raise AssertionError(f"{name} makes none of the formats")


def levels(row: Tensor, group_size: int | None) -> int:
    """Most distinct values in any group of a row."""
    return max(len(group.unique()) for group in row.split(group_size or len(row)))


@each_ptq
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [*FORMATS, None], ids=lambda format: str(format or "its own"))
def test_weights(name: str, asked: Format | None, dtype: torch.dtype) -> None:
    weights = asked or made_by(name)[0]
    need(name, weights, None)
    model = small_model(dtype)
    before = copy.deepcopy(model.state_dict())
    plans = plan(name, model, weights, None)
    assert set(plans) == {"0", "2"}
    for key, linear in linears_of(model).items():
        quantize = plans[key].weight
        assert quantize is not None
        new = plans[key].new_weight(linear.weight.detach())
        assert new.shape == linear.weight.shape
        assert new.dtype == dtype
        assert not new.requires_grad
        assert torch.isfinite(new).all()
        assert not torch.equal(new, linear.weight)
        assert plans[key].activation is None
        packed = plans[key].packed(linear.weight.detach())
        assert packed is not None, "no codes and scales"
        assert torch.equal(packed.dequantized(dtype), new)
        assert packed.bits == weights.bits
        if name not in OFF_GRID:
            assert max(levels(row, weights.group_size) for row in new) <= 2**weights.bits
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "model changed"


@each_ptq
def test_deterministic(name: str) -> None:
    first, second = (plan(name, small_model(), *made_by(name)) for _ in range(2))
    for key, linear in linears_of(small_model()).items():
        weight, x = linear.weight.detach(), torch.randn(2, 5, linear.in_features)
        assert torch.equal(first[key].new_weight(weight), second[key].new_weight(weight))
        assert torch.equal(first[key].new_input(x), second[key].new_input(x))


@each_ptq
@pytest.mark.parametrize("asked", [*FORMATS, None], ids=lambda format: str(format or "its own"))
def test_activations_are_batch_invariant(name: str, asked: Format | None) -> None:
    activations = asked or made_by(name)[1]
    need(name, None, activations)
    model = small_model()
    plans = plan(name, model, None, activations)
    for key, linear in linears_of(model).items():
        assert plans[key].weight is None
        quantize = plans[key].activation
        assert quantize is not None
        x = torch.randn(3, 7, linear.in_features, generator=torch.Generator().manual_seed(4))
        out = quantize(x)
        assert out.shape == x.shape
        assert out.dtype == x.dtype
        assert not torch.equal(out, x)
        assert torch.equal(out, torch.cat([quantize(x[index : index + 1]) for index in range(3)]))
        if activations.granularity != "channel":
            assert torch.equal(out[:, :2], quantize(x[:, :2])), "a token depends on those after it"
        assert quantize(x.bfloat16()).dtype == torch.bfloat16
        for row in out[0].mT if activations.granularity == "channel" else out[0]:
            assert levels(row, activations.group_size) <= 2**activations.bits


@each_ptq
def test_nothing_asked_nothing_planned(name: str) -> None:
    for entry in plan(name, small_model(), None, None).values():
        assert entry.weight is None
        assert entry.activation is None


@pytest.mark.parametrize("name", [name for name in ptqs.names() if ptqs.create(name).calibrates])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(name: str, bad: float) -> None:
    """One sentence with the linear, whether it comes with a sample, from inside the model, or in a weight."""
    samples = [torch.randn(5, 96, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    given = [samples[0], samples[1].clone(), samples[2]]
    given[1][2, 7] = bad
    inside, weight = small_model().requires_grad_(False), small_model().requires_grad_(False)
    inside[0].bias[3] = bad
    weight[2].weight[1, 1] = bad
    for model, data, message in (
        (small_model(), given, "the input of 0 has 1 of 480 values that are not finite"),
        (inside, samples, r"the input of 2 has \d+ of 200 values that are not finite"),
        (weight, samples, "the weight of 2 has 1 of 960 values that are not finite"),
    ):
        with pytest.raises(UserError, match=f"^calibration: {message}; try a wider dtype[^.]*$"):
            method(name).prepare(model, linears_of(model), *made_by(name), data)
