"""Plans on linears: what several linears read is quantized once, and never stays when what was read has changed."""

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from qapbench.methods.formats import Format
from qapbench.methods.plans import LinearPlan
from qapbench.quantize.install import SharedInputs, full_weight, installed, replaced
from qapbench.quantize.originals import Originals

FORMAT = Format(bits=4, group_size=8)


class Counted(Format):
    """Counts how often it quantizes."""

    calls: ClassVar[int] = 0

    def __call__(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        Counted.calls += 1
        return super().__call__(x, valid)


@pytest.fixture
def pair() -> Iterator[tuple[nn.Linear, nn.Linear]]:
    torch.manual_seed(0)
    Counted.calls = 0
    one, two = nn.Linear(16, 4), nn.Linear(16, 4)
    plan = LinearPlan(activation=Counted(bits=4, group_size=8))
    shared = SharedInputs()
    with installed(one, plan, shared=shared), installed(two, plan, shared=shared):
        yield one, two


@pytest.mark.parametrize("inference", [True, False])
def test_an_input_of_several_linears_is_quantized_once(pair: tuple[nn.Linear, nn.Linear], inference: bool) -> None:
    one, two = pair
    with torch.inference_mode() if inference else torch.no_grad():
        x = torch.randn(2, 3, 16)
        expected = FORMAT(x)
        assert torch.equal(one(x), nn.functional.linear(expected, one.weight, one.bias))
        assert torch.equal(two(x), nn.functional.linear(expected, two.weight, two.bias))
        assert Counted.calls == (2 if inference else 1)
        two(x.clone())
        assert Counted.calls == (3 if inference else 2)


@pytest.mark.parametrize("inference", [True, False])
def test_a_buffer_that_is_filled_anew_is_quantized_anew(pair: tuple[nn.Linear, nn.Linear], inference: bool) -> None:
    one, two = pair
    with torch.inference_mode() if inference else torch.no_grad():
        x = torch.randn(2, 16)
        for _ in range(2):
            for linear in (one, two):
                assert torch.equal(linear(x), nn.functional.linear(FORMAT(x), linear.weight, linear.bias))
            x.copy_(torch.randn(2, 16))
    assert Counted.calls == (4 if inference else 2)


def test_what_carries_gradients_is_not_shared(pair: tuple[nn.Linear, nn.Linear]) -> None:
    one, two = pair
    x = torch.randn(2, 16, requires_grad=True)
    (one(x).sum() + two(x).sum()).backward()
    assert Counted.calls == 2
    (expected,) = torch.autograd.grad(((FORMAT(x) @ one.weight.T).sum() + (FORMAT(x) @ two.weight.T).sum()), x)
    torch.testing.assert_close(x.grad, expected)


def test_formats_do_not_share() -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(16, 4), nn.Linear(16, 4)
    x = torch.randn(2, 16)
    coarse = Format(bits=2)
    plans = LinearPlan(activation=FORMAT), LinearPlan(activation=coarse)
    shared = SharedInputs()
    with torch.no_grad(), installed(one, plans[0], shared=shared), installed(two, plans[1], shared=shared):
        one(x)
        assert torch.equal(two(x), nn.functional.linear(coarse(x), two.weight, two.bias))


def test_without_shared_inputs_nothing_is_shared() -> None:
    torch.manual_seed(0)
    Counted.calls = 0
    one, two = nn.Linear(16, 4), nn.Linear(16, 4)
    plan = LinearPlan(activation=Counted(bits=4, group_size=8))
    x = torch.randn(2, 16)
    expected = FORMAT(x)
    with torch.no_grad(), installed(one, plan), installed(two, plan):
        for linear in (one, two):
            assert torch.equal(linear(x), nn.functional.linear(expected, linear.weight, linear.bias))
    assert Counted.calls == 2
    with torch.no_grad(), installed(one, plan, shared=SharedInputs()), installed(two, plan, shared=SharedInputs()):
        one(x), two(x)
    assert Counted.calls == 4


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("through", ["itself", "a view", "a part"])
def test_a_change_in_place_between_two_readers_is_noticed(
    pair: tuple[nn.Linear, nn.Linear], through: str, inference: bool
) -> None:
    one, two = pair
    with torch.inference_mode() if inference else torch.no_grad():
        x = torch.randn(2, 16)
        one(x)
        changed = {"itself": x, "a view": x.view(-1), "a part": x[:1, 3:]}[through]
        changed += 2
        assert torch.equal(two(x), nn.functional.linear(FORMAT(x), two.weight, two.bias))
    assert Counted.calls == 2


@pytest.mark.parametrize("inference", [True, False])
def test_a_change_of_the_quantized_input_reaches_no_other_reader(
    pair: tuple[nn.Linear, nn.Linear], inference: bool
) -> None:
    """What a hook behind the quantization does to the input of its linear stays there."""
    one, two = pair
    handle = one.register_forward_pre_hook(lambda _module, args: _triple(args[0]))
    with torch.inference_mode() if inference else torch.no_grad():
        x = torch.randn(2, 16)
        assert torch.equal(one(x), nn.functional.linear(3 * FORMAT(x), one.weight, one.bias))
        assert torch.equal(two(x), nn.functional.linear(FORMAT(x), two.weight, two.bias))
    handle.remove()


def _triple(x: Tensor) -> None:
    x.mul_(3)


@pytest.mark.parametrize("keep", ["memory", "file", "checkpoint"])
def test_the_full_weight_is_read_wherever_it_waits(keep: str) -> None:
    """Also while a second weight is in the place of the first one."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    linear: Any = model[0]
    before, originals = linear.weight.detach().clone(), Originals(model, keep)
    with replaced(linear, torch.zeros(4, 8), originals):
        assert torch.equal(full_weight(linear), before)
        with replaced(linear, torch.ones(4, 8)):
            assert torch.equal(full_weight(linear), before)
        assert torch.equal(full_weight(linear), before)
    assert torch.equal(full_weight(linear), before)
    assert torch.equal(linear.weight, before)
