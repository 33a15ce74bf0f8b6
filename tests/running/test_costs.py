"""A record says what a prompt of its run costs, from the config and from what was measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qapbench
from qapbench import Prompt, Record, RunSpec, load_records
from qapbench.records.record import CostRecord
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
