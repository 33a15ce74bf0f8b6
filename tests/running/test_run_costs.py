"""A record says what a prompt of its run costs, from the config and from what was measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qapbench
from qapbench import Prompt, Record, RunSpec, UserError, load_records
from qapbench.records.parts import BudgetUse, CostRecord
from qapbench.running.several import _cost

Spec = Callable[..., dict[str, Any]]
W4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 16}, "activations": {"bits": 8}}


@pytest.fixture
def records(spec_of: Spec, tmp_path: Path) -> dict[str, Record]:
    rows = {
        "dense": {},
        "random": {"prune": {"method": "random", "keep": 5}, "quantize": W4},
        "fastv": {"prune": {"method": "fastv", "keep": 5}},
    }
    specs = [RunSpec.parse({**spec_of(**row), "name": name}) for name, row in rows.items()]
    made = dict(zip(rows, qapbench.run(specs, tmp_path / "runs", progress=False), strict=True))
    assert {record.name: record.cost for record in load_records(tmp_path / "runs")} == {
        name: record.cost for name, record in made.items()
    }, "they are stored"
    return made


def test_costs_of_runs(records: dict[str, Record]) -> None:
    costs = {name: record.cost for name, record in records.items()}
    dense, random, fastv = costs["dense"], costs["random"], costs["fastv"]
    assert dense and random and fastv
    tokens = records["dense"].tokens
    assert tokens
    assert dense.layer_mean == dense.available == tokens.available
    assert (dense.tokens_share, dense.flops_share, dense.text) == (1, 1, Prompt().text)
    assert random.layer_mean == 5
    assert random.tokens_share == 5 / tokens.available
    assert random.flops.prefill < dense.flops.prefill
    assert random.bops.prefill < random.flops.prefill / 2
    assert random.weight_bytes < dense.weight_bytes
    measured = records["fastv"].tokens
    assert measured and measured.layer_mean
    assert fastv.layer_mean == pytest.approx(measured.layer_mean)
    assert fastv.kv_bytes / dense.kv_bytes == pytest.approx((fastv.layer_mean + 64) / (dense.layer_mean + 64))
    said = qapbench.cost(records["fastv"].spec["model"], {"prune": {"method": "fastv", "keep": 5}, "dtype": "float32"})
    assert fastv.flops.prefill == pytest.approx(said.flops.prefill)


def test_budgets_by_cost_are_proven_by_the_record(spec_of: Spec, tmp_path: Path) -> None:
    """Of 4 layers with 16 tokens, FastV's first 2 see all: (32 + 2 k) / 4 = 10 gives 4."""
    rows = {
        "random": {"method": "random", "keep": {"layer_mean": 10}},
        "fastv": {"method": "fastv", "keep": {"layer_mean": 10}},
        "plain": {"method": "fastv", "keep": 4},
    }
    specs = [RunSpec.parse({**spec_of(prune=prune), "name": name}) for name, prune in rows.items()]
    random, fastv, plain = qapbench.run(specs, tmp_path / "runs", progress=False)
    for record, keep in ((random, 10), (fastv, 4)):
        assert record.cost
        assert record.cost.budget == BudgetUse(cost="layer_mean", asked=10, keep=keep, reached=10)
        assert record.cost.layer_mean == 10
        assert record.spec["prune"]["keep"] == {"layer_mean": 10}
    assert plain.cost and plain.cost.budget is None
    assert fastv.scores == plain.scores
    assert "keep" in fastv.fingerprints
    assert "keep" not in plain.fingerprints
    bad = RunSpec.parse({**spec_of(prune={"method": "fastv", "keep": {"layer_mean": 3}}), "name": "bad"})
    with pytest.raises(UserError, match="fastv cannot come within 1 % of layer_mean 3 on this model"):
        qapbench.run([bad], tmp_path / "runs", progress=False)


def test_the_cost_of_several_tasks_is_the_mean_over_images(records: dict[str, Record]) -> None:
    dense, random = records["dense"], records["random"]
    tokens = dense.tokens
    assert tokens and dense.cost and random.cost
    few = dense.model_copy(update={"tokens": tokens.model_copy(update={"images": 1})})
    many = random.model_copy(update={"tokens": tokens.model_copy(update={"images": 3})})
    both = _cost([few, many])
    assert isinstance(both, CostRecord)
    assert both.layer_mean == pytest.approx((dense.cost.layer_mean + 3 * 5) / 4)
    assert both.flops.prefill == pytest.approx((dense.cost.flops.prefill + 3 * random.cost.flops.prefill) / 4)
    assert _cost([few, many.model_copy(update={"cost": None})]) is None, "a record of an earlier version states none"
