"""`prune.schedule`: drops inside the decoder that a spec says, in the place of the method's own."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.cost import PROMPTS, tiny_model
from qapbench import DecoderPruner, RunSpec, Stage, UserError, compress, cost, pruners
from qapbench.models.family import families
from qapbench.prune.stages import layer_counts, scheduled

INSIDE = [name for name in pruners.names() if isinstance(pruners.create(name), DecoderPruner)]
DEPTH = 4


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, dict[str, Any]]:
    return tiny_model(families.create("llava"))


def pruned(tiny: tuple[Any, dict[str, Any]], **prune: Any) -> tuple[torch.Tensor, Any]:
    model, inputs = tiny
    with torch.no_grad(), compress(model, {"prune": prune}) as receipt:
        return model(**inputs, use_cache=True).logits, receipt


@pytest.mark.parametrize("name", INSIDE)
def test_the_methods_own_drops_as_a_schedule_are_the_method(name: str, tiny: tuple[Any, dict[str, Any]]) -> None:
    available = cost(tiny[0], None, PROMPTS["llava"]).available
    own = pruners.create(name).stages(int(available), 5, DEPTH)
    wanted, receipt = pruned(tiny, method=name, keep=5)
    schedule = [{"layer": stage.after, "keep": stage.keep} for stage in own if stage.keep]
    if pruners.create(name).counts == "mean":  # it leaves none in the end, which a schedule cannot say
        schedule = [{"layer": 1, "keep": 7}]
        wanted, receipt = pruned(tiny, method=name, schedule=schedule)
    got, said = pruned(tiny, method=name, schedule=schedule)
    assert torch.equal(got, wanted)
    assert said.layers == receipt.layers


@pytest.mark.parametrize("name", INSIDE)
def test_layers_receive_what_the_schedule_says_and_cost_as_much(name: str, tiny: tuple[Any, dict[str, Any]]) -> None:
    prune = {"method": name, "schedule": [{"layer": 1, "keep": 9}, {"layer": 3, "keep": 2}]}
    _, receipt = pruned(tiny, **prune)
    planned = cost(tiny[0], {"prune": prune}, PROMPTS["llava"])
    entering = pruners.create(name).entering(int(planned.available), 2)
    assert receipt.layers == [entering, min(entering, 9), min(entering, 9), 2]
    assert entering == planned.available or pruners.create(name).front is not None
    assert planned.tokens_per_layer == tuple(receipt.layers)
    assert f"{name} 2 (9 after 1, 2 after 3): 2 of" in receipt.summary()
    assert receipt.tokens["layer_mean"] == planned.layer_mean


def test_a_drop_behind_the_last_layer_is_refused(tiny: tuple[Any, dict[str, Any]]) -> None:
    prune = {"method": "fastv", "schedule": [{"layer": 1, "keep": 9}, {"layer": 4, "keep": 2}]}
    said = r"prune\.schedule\.1\.layer: a drop is between two of the decoder's 4 layers: after 1 to 3 of them \(got 4\)"
    with pytest.raises(UserError, match=said):
        pruned(tiny, **prune)
    with pytest.raises(UserError, match=said):
        cost(tiny[0], {"prune": prune}, PROMPTS["llava"])
    with pytest.raises(UserError, match="keep=99 is out of range"):
        pruned(tiny, method="fastv", schedule=[{"layer": 1, "keep": 99}])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sets(st.integers(1, 11), min_size=1, max_size=6),
    st.sets(st.integers(1, 40), min_size=6, max_size=6),
    st.integers(1, 40),
)
def test_counts_fall_and_are_the_least_said_so_far(layers: set[int], budgets: set[int], count: int) -> None:
    steps = [Stage(*pair) for pair in zip(sorted(layers), sorted(budgets, reverse=True), strict=False)]
    counts = layer_counts(scheduled(steps, count, 12), count, 12)
    assert counts == [min([count, *(step.keep for step in steps if step.after <= layer)]) for layer in range(12)]


SCHEDULE = [{"layer": 2, "keep": 9}, {"layer": 3, "keep": 4}]


@pytest.mark.parametrize(
    ("prune", "said"),
    [
        ({"method": "cdpruner", "schedule": SCHEDULE}, r"prune\.schedule: cdpruner chooses tokens in front of .*fastv"),
        ({"method": "fastv", "keep": 5, "schedule": SCHEDULE}, r"prune\.keep: the last drop .* leaves 4"),
        ({"method": "fastv", "keep": {"layer_mean": 5}, "schedule": SCHEDULE}, r"prune\.keep: a cost and a `schedule`"),
        ({"method": "fastv", "schedule": SCHEDULE[::-1]}, r"prune\.schedule\.1\.layer: each drop has a later layer"),
        (
            {"method": "fastv", "schedule": [SCHEDULE[0], {"layer": 3, "keep": 9}]},
            r"prune\.schedule\.1\.keep: each drop has fewer tokens than the one before \(9\)",
        ),
        ({"method": "fastv", "schedule": [{"layer": 0, "keep": 4}]}, r"prune\.schedule\.0\.layer: "),
        ({"method": "fastv"}, r"prune\.keep: this field is required"),
    ],
)
def test_mistakes_are_named_at_their_place(prune: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        RunSpec.parse({"model": "m", "task": "t", "prune": prune})


def test_the_schedule_is_part_of_what_identifies_a_run() -> None:
    runs = [
        RunSpec.parse({"model": "m", "task": "t", "prune": {"method": "fastv", **prune}})
        for prune in (
            {"keep": 4},
            {"schedule": SCHEDULE},
            {"keep": 4, "schedule": SCHEDULE},
            {"keep": 4, "schedule": None},
        )
    ]
    first, second, third, fourth = (run.digest({}) for run in runs)
    assert (first, second) == (fourth, third)
    assert first != second
    assert RunSpec.parse(runs[1].model_dump(mode="json")) == runs[1]
    assert "schedule" not in runs[0].canonical()
