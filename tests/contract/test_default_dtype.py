"""torch.set_default_dtype around a call changes no number, of any quantizer, metric, pruner or PTQ method."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from metrics_on_a_model import create
from test_ptq_contract import linears_of, made_by, method, small_model
from torch import Tensor

from qapbench import LinearPlan, Selection, VisionTokens, metrics, pruners, ptqs, quantizers


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def other_default(request: pytest.FixtureRequest) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Calls a function under another default dtype."""
    before = torch.get_default_dtype()

    def call(function: Callable[[], Any]) -> Any:
        torch.set_default_dtype(request.param)
        try:
            return function()
        finally:
            torch.set_default_dtype(before)

    yield call
    torch.set_default_dtype(before)


def same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)


Under = Callable[[Callable[[], Any]], Any]


@pytest.mark.parametrize("name", quantizers.names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantizers(name: str, dtype: torch.dtype, other_default: Under, tokens: VisionTokens) -> None:
    x, quantize = tokens.projected.to(dtype), quantizers.create(name)
    assert same(other_default(lambda: quantize(x)), quantize(x))


@pytest.mark.parametrize("name", metrics.names())
def test_metrics(name: str, other_default: Under, tokens: VisionTokens) -> None:
    measure = create(name, tokens.projected.shape[-1])
    assert same(other_default(lambda: measure(tokens.projected)), measure(tokens.projected))


@pytest.mark.parametrize("name", pruners.names())
@pytest.mark.parametrize("fused", [False, True])
def test_pruners(name: str, fused: bool, other_default: Under, tokens: VisionTokens) -> None:
    sensitivity = metrics.create("combined")(tokens.projected) if fused else None

    def select() -> Selection:
        return pruners.create(name).select(tokens, 20, sensitivity)

    plain, other = select(), other_default(select)
    for field in ("indices", "merged", "updated"):
        assert same(getattr(other, field), getattr(plain, field)), field
    relevance = pruners.create(name).relevance
    assert same(other_default(lambda: relevance(tokens)), relevance(tokens))


@pytest.mark.parametrize("name", ptqs.names())
def test_ptq(name: str, other_default: Under) -> None:
    model = small_model()
    linears, formats = linears_of(model), made_by(name)
    samples = list(torch.randn(4, 5, 96, generator=torch.Generator().manual_seed(1)))
    plain = method(name).prepare(model, linears, *formats, samples)
    other = other_default(lambda: method(name).prepare(model, linears, *formats, samples))
    x = torch.randn(1, 3, 96, generator=torch.Generator().manual_seed(2))

    def used(plans: dict[str, LinearPlan]) -> list[Tensor]:
        weights = [plans[key].new_weight(linear.weight.detach()) for key, linear in linears.items()]
        return [*weights, *(plans[key].new_input(x[..., : linear.in_features]) for key, linear in linears.items())]

    assert all(map(same, other_default(lambda: used(other)), used(plain)))
