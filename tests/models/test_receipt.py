"""The receipt says what reached the matmul, and a run that was not quantized fails."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from qapbench import PTQ, Format, LinearPlan, compress, fake_quantize, ptq, ptqs
from qapbench.quantize.measured_bits import measured_bits
from qapbench.receipt import ImageTokens, NotQuantizedError, Receipt

FORMAT = {"bits": 4, "group_size": 16}


@pytest.fixture
def lazy_method() -> Iterator[str]:
    """A PTQ method that promises and does nothing."""

    @ptq("lazy")
    @dataclass(frozen=True)
    class Lazy(PTQ):
        """Leaves every linear as it is."""

        def prepare(
            self,
            model: nn.Module,
            linears: Mapping[str, nn.Linear],
            weights: Format | None,
            activations: Format | None,
            calibration: Any = None,
        ) -> dict[str, LinearPlan]:
            return {name: LinearPlan() for name in list(linears)[1:]}

    yield "lazy"
    del ptqs._entries["lazy"]


@pytest.mark.parametrize(("weight", "activation"), [(4, 4), (4, 8), (8, 8), (4, None), (None, 8)])
def test_measured_bits_are_those_asked_for(
    weight: int | None, activation: int | None, model: Any, one: dict[str, Any]
) -> None:
    spec = {
        "method": "rtn",
        "scope": ["language"],
        "weights": {"bits": weight, "group_size": 16} if weight else None,
        "activations": {"bits": activation} if activation else None,
    }
    with compress(model, {"quantize": spec}) as receipt, torch.no_grad():
        model(**one)
    receipt.check()
    assert len(receipt.linears) == 14
    assert {line.weight_bits for line in receipt.linears} == {weight or 32}
    assert {line.activation_bits for line in receipt.linears} == {activation or 32}
    assert {line.calls for line in receipt.linears} == {1}
    assert {line.part for line in receipt.linears} == {"language"}
    assert {line.activation_exact for line in receipt.linears} == {0}


def test_scope_is_what_is_quantized(model: Any, one: dict[str, Any]) -> None:
    spec = {"method": "rtn", "weights": FORMAT, "activations": FORMAT, "scope": ["projector", "vision"]}
    with compress(model, {"quantize": spec}) as receipt, torch.no_grad():
        model(**one)
    assert {line.part for line in receipt.linears} == {"projector", "vision"}
    assert not any("language_model" in line.name or "lm_head" in line.name for line in receipt.linears)


def test_a_method_that_does_nothing_fails_the_run(lazy_method: str, model: Any, one: dict[str, Any]) -> None:
    spec = {"method": lazy_method, "weights": FORMAT, "activations": FORMAT}
    with compress(model, {"quantize": spec}) as receipt, torch.no_grad():
        model(**one)
    assert len(receipt.fallbacks) == 1
    assert {line.weight_bits for line in receipt.linears} == {32}
    with pytest.raises(NotQuantizedError, match="weights were to be quantized, but 0 of 13"):
        receipt.check()


def test_activations_that_something_undoes_fail_the_run(model: Any, one: dict[str, Any]) -> None:
    """A hook of somebody else's that puts full precision back is seen, because the probe looks last."""
    spec = {"quantize": {"method": "rtn", "activations": FORMAT}}
    noise = torch.Generator().manual_seed(0)
    with compress(model, spec) as receipt, torch.no_grad():
        for line in receipt.linears:
            linear = model.get_submodule(line.name)
            probe_id, probe = linear._forward_pre_hooks.popitem()
            linear.register_forward_pre_hook(lambda _, args: (torch.randn(args[0].shape, generator=noise),))
            linear._forward_pre_hooks[probe_id] = probe
        model(**one)
    with pytest.raises(NotQuantizedError, match="activations were to be quantized, but 0 of 14 linears"):
        receipt.check()


def test_a_model_that_never_ran_fails(model: Any) -> None:
    with compress(model, {"quantize": {"method": "rtn", "activations": FORMAT}}) as receipt:
        pass
    with pytest.raises(NotQuantizedError, match="0 of 0 linears in use"):
        receipt.check()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 32, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_bits_are_measured_also_where_groups_are_small(bits: int, group_size: int | None, symmetric: bool) -> None:
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(bits))
    format = Format(bits=bits, group_size=group_size, symmetric=symmetric)
    assert measured_bits(fake_quantize(x, bits, group_size, symmetric), format)[0] == bits
    assert measured_bits(x, format)[0] == 32
    assert measured_bits(x.bfloat16(), format)[0] == 16


@pytest.mark.parametrize("width", [48, 192])
def test_a_scale_shared_with_what_is_not_here_is_found(width: int) -> None:
    """One static scale for all tokens, or one that an outlier set: no row's own range tells the step."""
    format = Format(bits=8, symmetric=True)
    rows = torch.randn(8, width, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 1, 8)[:, None]
    on_grid = (rows / 0.031).round() * 0.031
    assert measured_bits(on_grid, format)[0] == 8
    assert measured_bits(rows, format)[0] == 32
    assert measured_bits(on_grid + 0.01 * torch.randn_like(rows), format)[0] == 32


def test_counting_anew_from_what_is_stored() -> None:
    """What an earlier session stored beside its answers counts as if it were seen now, and nothing counts twice."""
    stored = [
        ImageTokens(available=16, kept=[0, 3], merged=1, separators=2, layers=[16, 3]),
        ImageTokens(available=9),
        ImageTokens(available=12, kept=[1], layers=[12, 1]),
    ]
    seen = Receipt(pruning="mine")
    seen.saw_image(16, 2, 1, 2, [16, 3])
    seen.saw_image(9, 9, 0)
    seen.saw_image(12, 1, 0, layers=[12, 1])
    counted = Receipt(pruning="mine")
    for _ in range(2):
        counted.recount(stored)
        assert counted == seen
    assert (counted.images, counted.available, counted.kept, counted.merged) == (3, 37, 12, 1)
    assert (counted.least, counted.most, counted.separators, counted.layers) == (1, 9, 2, [28, 4])
    assert Receipt.model_validate_json(counted.model_dump_json()) == counted
    counted.recount([])
    assert counted == Receipt(pruning="mine")


def test_tokens_that_all_leave_count_by_their_mean_over_layers() -> None:
    seen = Receipt(pruning="mine")
    seen.saw_image(16, 0, 0, layers=[16, 16, 5, 0])
    seen.saw_image(16, 0, 0, layers=[16, 0, 0, 0])
    assert (seen.kept, seen.merged, seen.least, seen.most) == (0, 0, 4, 10)  # 37 / 4 and 16 / 4, rounded up
    assert seen.tokens["mean"] == seen.tokens["layer_mean"] == 53 / 8
    assert seen.summary() == "full precision; mine: 6.625 of 16 tokens on the average of layers, none in the last"
