"""A budget that is a cost becomes a number of tokens within one percent, for methods of every kind."""

from collections.abc import Callable
from typing import Any

import pytest

from qapbench import Prompt, RunSpec, UserError, compress, cost
from qapbench.costing.budget import reached, resolved
from qapbench.costing.known import CostedModel, costed_model
from qapbench.costing.tokens import token_flow
from qapbench.methods.kinds import pruners
from qapbench.models.family import families
from qapbench.spec.run_spec import PruneSpec

SEVEN = "llava-1.5-7b"


def prune_of(method: str, **keep: float) -> PruneSpec:
    found = RunSpec.parse({"model": "m", "task": "t", "prune": {"method": method, "keep": keep}}).prune
    assert found
    return found


@pytest.fixture(scope="module")
def model() -> CostedModel:
    return costed_model(SEVEN)


@pytest.mark.parametrize("method", ["random", "fastv", "pyramiddrop", "sparsevlm", "vtw", "pact"])
def test_methods_at_one_layer_mean(method: str, model: CostedModel) -> None:
    """Of 32 layers; a method inside the decoder cannot go below what its first layers see."""
    target = 400.0
    keep = resolved(prune_of(method, layer_mean=target), model).keep
    family, pruner = model.family, pruners.create(method)
    outline, depth = family.outline(Prompt().images), 32

    def mean(keep: int) -> float:
        prune = RunSpec.parse({"model": "m", "task": "t", "prune": {"method": method, "keep": keep}}).prune
        return sum(token_flow(outline, prune, pruner, depth).layers) / depth

    assert mean(keep) == pytest.approx(target, rel=0.01)
    assert all(abs(mean(other) - target) >= abs(mean(keep) - target) for other in (keep - 1, keep + 1))


def test_fastv_by_hand(model: CostedModel) -> None:
    # 2 layers see 576 and 30 see k: (1152 + 30 k) / 32 = 64 gives 29.9.
    assert resolved(prune_of("fastv", layer_mean=64), model).keep == 30
    assert resolved(prune_of("divprune", layer_mean=64), model).keep == 64


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_shares_of_flops_and_bytes_of_the_cache(method: str, model: CostedModel) -> None:
    dense = cost(SEVEN)
    for asked in ({"flops": 0.25}, {"kv_bytes": 100e6}):
        ((name, value),) = asked.items()
        given = {"prune": {"method": method, "keep": asked}}
        found = cost(SEVEN, given)
        assert reached(name, found, dense) == pytest.approx(value, rel=0.01)
        assert (
            found.tokens_per_layer
            == cost(SEVEN, {"prune": resolved(prune_of(method, **asked), model).model_dump()}).tokens_per_layer
        )


def test_a_quantized_cache_has_room_for_more_tokens() -> None:
    spec = {"prune": {"method": "random", "keep": {"kv_bytes": 60e6}}}
    kv = {"keys": {"bits": 4}, "values": {"bits": 4}, "residual": 32}
    quantized = {"quantize": {"method": "rtn", "kv": kv}}
    assert cost(SEVEN, {**spec, **quantized}).layer_mean > 2 * cost(SEVEN, spec).layer_mean


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_compress_takes_a_cost(family: str) -> None:
    """Each tile of the whole prompt of `Prompt` counts, so the mean is far above that of the small image here."""
    made: Callable[[], tuple[Any, Any]] = families.create(family).tiny
    tiny, inputs = made()
    dense = cost(tiny)
    spec = {"prune": {"method": "random", "keep": {"layer_mean": dense.available / 2}}}
    said = cost(tiny, spec)
    assert said.tokens_share == pytest.approx(0.5, rel=0.01)
    with compress(tiny, spec) as receipt:
        tiny(**inputs)
    assert receipt.pruning and receipt.images == 1


def test_what_cannot_be_reached_is_said_with_what_can(model: CostedModel) -> None:
    with pytest.raises(
        UserError, match=r"prune\.keep\.layer_mean: fastv cannot come within 1 % of layer_mean 20 .* 36.94 w"
    ):
        resolved(prune_of("fastv", layer_mean=20), model)
    with pytest.raises(UserError, match=r"prune\.keep\.flops: random cannot come within 1 % of flops 0.05"):
        resolved(prune_of("random", flops=0.05), model)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"layer_means": 3}, "prune.keep.layer_means: unknown field; did you mean 'layer_mean'?"),
        ({}, "prune.keep: give exactly one of layer_mean, flops and kv_bytes"),
        ({"flops": 0.1, "layer_mean": 3}, "prune.keep: give exactly one of"),
        ({"flops": 1.5}, "prune.keep.flops: input should be less than or equal to 1"),
        ({"layer_mean": 0}, "prune.keep.layer_mean: input should be greater than 0"),
        (0, "prune.keep: input should be greater than or equal to 1"),
    ],
)
def test_mistakes_in_a_spec(keep: Any, message: str) -> None:
    with pytest.raises(UserError) as found:
        RunSpec.parse({"model": "m", "task": "t", "prune": {"method": "random", "keep": keep}})
    assert message in str(found.value)


def test_a_spec_with_a_cost_is_written_as_it_was_read() -> None:
    spec = RunSpec.parse({"model": "m", "task": "t", "prune": {"method": "random", "keep": {"flops": 0.5}}})
    data = spec.model_dump(mode="json")
    assert data["prune"]["keep"] == {"flops": 0.5}
    assert "budget" not in data["prune"]
    assert RunSpec.parse(data) == spec
    assert spec.prune and spec.prune.label == "random flops 0.5"
    plain = RunSpec.parse({"model": "m", "task": "t", "prune": {"method": "random", "keep": 5}})
    assert "budget" not in plain.model_dump(mode="json")["prune"]
    with pytest.raises(UserError, match=r"prune\.budget: unknown field; a cost stands under `keep`"):
        RunSpec.parse({"model": "m", "task": "t", "prune": {"method": "random", "keep": 5, "budget": {"flops": 1}}})
