"""`qapbench profile`: what is measured is told apart, and a simulation is called one. No test asserts a time."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import qapbench
from qapbench import RunSpec, UserError
from qapbench.analysis.profile_table import profile_table
from qapbench.leaderboard.costs import costs_of
from qapbench.records.profile import Profile, read_profiles, write_profile
from qapbench.running.planner import Planner
from qapbench.running.profile import profile
from qapbench.running.session import Session
from qapbench.running.settings import Settings

Spec = Callable[..., dict[str, Any]]
ROWS: dict[str, dict[str, Any]] = {
    "dense": {},
    "random": {"prune": {"method": "random", "keep": 5}},
    "fastv": {"prune": {"method": "fastv", "keep": 5}},
    "W4": {"quantize": {"method": "rtn", "weights": {"bits": 4}}, "prune": {"method": "random", "keep": 5}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiled") / "runs"


def specs_of(spec_of: Spec, names: list[str]) -> list[RunSpec]:
    return [RunSpec.parse({**spec_of(**ROWS[name]), "name": name}) for name in names]


def measured(specs: list[RunSpec], runs: Path) -> dict[str, Profile]:
    settings = Settings(runs, torch.device("cpu"))
    found = profile(specs, Session(settings), Planner(runs, settings.device), repeats=2, new_tokens=3)
    return {one.name: one for one in found}


def test_every_row_is_measured_and_a_simulation_is_called_one(spec_of: Spec, runs: Path) -> None:
    found = measured(specs_of(spec_of, list(ROWS)), runs)
    assert {name: one.simulated for name, one in found.items()} == {
        "dense": False,
        "random": False,
        "fastv": False,
        "W4": True,
    }
    assert {name for name, one in found.items() if one.selection is not None} == {"random", "W4"}
    dense = found["dense"]
    assert (dense.repeats, dense.new_tokens, dense.threads) == (2, 3, 1)
    assert found["random"].tokens == dense.tokens - 16 + 5
    assert found["fastv"].tokens == dense.tokens, "tokens are dropped later"
    for one in found.values():
        assert one.bound and one.bound > 0
        assert all(0 < spread.low <= spread.median <= spread.high for spread in (one.prefill, one.token, one.prompt))
        assert one.prompt.low >= one.prefill.low
        write_profile(runs, one)
    assert read_profiles(runs) == {one.run_id: one for one in found.values()}
    (runs / "profiles" / "torn.json").write_text("{", encoding="utf-8")
    assert len(read_profiles(runs)) == len(ROWS)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(profile_table(list(found.values())))
    lines = console.export_text().splitlines()
    assert [line.count("simulated") for line in lines if "W4" in line] == [3]
    assert all("simulated" not in line for line in lines if "dense" in line)


def test_the_page_shows_no_time_of_a_simulation(spec_of: Spec, runs: Path) -> None:
    specs = specs_of(spec_of, ["random", "W4"])
    records = qapbench.run(specs, runs, progress=False)
    profiles = read_profiles(runs)
    random, simulated = (costs_of(record, profiles[record.run_id]) for record in records)
    assert random["ms"] == 1e3 * profiles[records[0].run_id].prompt.median
    assert "ms" not in simulated


def test_only_runs_that_can_be_compared_are_measured_together(spec_of: Spec, runs: Path) -> None:
    other = RunSpec.parse({**spec_of(task={"limit": 2}), "name": "other"})
    with pytest.raises(UserError, match="several models or tasks"):
        measured([*specs_of(spec_of, ["dense"]), other], runs)
