"""`qapbench profile`: what is measured is told apart, and a simulation is called one. No test asserts a time."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlavaForConditionalGeneration

import qapbench
from qapbench import RunSpec, UserError
from qapbench.analysis.profile_table import profile_table
from qapbench.costing.devices import devices, reported_device
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


def measured(specs: list[RunSpec], runs: Path, repeats: int = 2, batch: int = 1) -> dict[str, Profile]:
    settings = Settings(runs, torch.device("cpu"))
    found = profile(specs, Session(settings), Planner(runs, settings.device), repeats, new_tokens=3, batch=batch)
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
        assert one.answer and one.answer.low > one.prompt.low
        assert (one.batch, one.prompts_per_second) == (1, 1 / one.answer.median)
        assert one.tokens_per_second == 1 / one.token.median
        assert one.attention == "sdpa (flash_attention_for_cpu)"
        assert "addmm" in one.matmul or "mm" in one.matmul
        write_profile(runs, one)
    assert read_profiles(runs) == {one.run_id: one for one in found.values()}
    (runs / "profiles" / "torn.json").write_text("{", encoding="utf-8")
    assert len(read_profiles(runs)) == len(ROWS)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(profile_table(list(found.values())))
    lines = console.export_text().splitlines()
    assert [line.count("simulated") for line in lines if "W4" in line] == [5]
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


def test_a_batch_is_the_prompt_several_times(spec_of: Spec, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruners of both kinds prune every prompt of it, and its profile stands beside that of one prompt."""
    specs = specs_of(spec_of, ["dense", "random", "fastv"])
    seen: list[tuple[int, ...]] = []
    generate = LlavaForConditionalGeneration.generate

    def noted(model: Any, **inputs: Any) -> Any:
        layers = model.model.language_model.layers
        handle = layers[-1].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
        try:
            found = generate(model, **inputs)
        finally:
            handle.remove()
        assert len({tuple(row.tolist()) for row in found}) == 1, "equal prompts have equal answers"
        return found

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", noted)
    alone, together = measured(specs, runs, repeats=1), measured(specs, runs, repeats=1, batch=3)
    prefills = [shape for shape in seen if shape[1] > 1]
    lengths = {name: one.tokens - (11 if name == "fastv" else 0) for name, one in alone.items()}
    assert set(prefills) == {(rows, length) for rows in (1, 3) for length in lengths.values()}
    for name, one in together.items():
        assert one.answer
        assert (one.batch, one.tokens) == (3, alone[name].tokens)
        assert one.prompts_per_second == 3 / one.answer.median
        assert one.bound and one.bound > (alone[name].bound or 0)
        write_profile(runs, alone[name])
        write_profile(runs, one)
    for batch, found in ((1, alone), (3, together)):
        kept = read_profiles(runs, batch)
        assert {one.run_id: one for one in found.values()}.items() <= kept.items()


def test_a_gpu_is_known_by_what_its_driver_calls_it() -> None:
    for name, kind in {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-PCIE-40GB": "a100",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "NVIDIA L4": "l4",
        "Orin (nvgpu)": "jetson-orin",
    }.items():
        assert reported_device(name) == devices()[kind]
    assert reported_device("NVIDIA L40S") is None
