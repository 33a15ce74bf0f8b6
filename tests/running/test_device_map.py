"""`--device-map`: which devices it stands for, what it excludes, and what a run needs on all of them together."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from qapbench import UserError
from qapbench.cli import app
from qapbench.models import placement
from qapbench.models.loading import load_model, load_processor
from qapbench.models.unread import UnreadWeight
from qapbench.running import engines, estimate, session
from qapbench.running.engines import make_settings
from qapbench.running.estimate import of_all, refuse_unless_it_fits
from qapbench.running.execute import make_runs
from qapbench.running.settings import Settings
from qapbench.spec.run_spec import RunSpec
from tests.models.llava_checkpoints import save_llava

GPU = torch.device("cuda")


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int, device: torch.device = GPU) -> None:
    monkeypatch.setattr(engines, "find_device", lambda name: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_all_gpus_share_a_model_and_one_has_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 3)
    settings = make_settings(tmp_path, None, device_map="auto", may_share=True)
    assert settings.held_on == settings.devices == tuple(torch.device("cuda", index) for index in range(3))
    assert (settings.device, settings.in_process, settings.may_share) == (settings.devices[0], True, False)
    with_gpus(monkeypatch, 1)
    settings = make_settings(tmp_path, None, device_map="auto")
    assert settings.held_on == settings.devices == (torch.device("cuda", 0),)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"device_map": "atuo"}, r"^--device-map: no way 'atuo'; did you mean 'auto'\?$"),
        ({"device_map": "x"}, "^--device-map: no way 'x'; valid: auto$"),
        ({"device_map": "auto", "workers": 2}, "^--device-map: one model takes all GPUs, so --workers 2 cannot"),
        ({"device_map": "auto", "engine": "ray"}, "^--device-map: workers of a Ray cluster have one GPU each"),
    ],
)
def test_what_it_cannot_be_is_one_sentence(
    asked: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, 2)
    with pytest.raises(UserError, match=message):
        make_settings(tmp_path, None, **asked)


def test_a_certain_gpu_is_not_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2, torch.device("cuda", 1))
    with pytest.raises(UserError, match=r"uses every cuda, and --device cuda:1 is a certain one"):
        make_settings(tmp_path, "cuda:1", device_map="auto")


def test_the_command_refuses_it_on_a_cpu(tmp_path: Path) -> None:
    command = ["run", "quickstart", "--runs", str(tmp_path), "--device", "cpu", "--device-map", "auto"]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, UserError)
    assert str(done.exception) == (
        "--device-map: it spreads a model over GPUs, and the device is the CPU; leave it out"
    )
    assert not list(tmp_path.iterdir())


def test_what_is_free_is_added_up_over_the_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rtn = {"quantize": {"method": "rtn", "weights": {"bits": 4}}}
    spec = RunSpec.parse({"name": "one", "model": "diagram-llava", "task": {"name": "diagramqa", "limit": 2}, **rtn})
    devices = tuple(torch.device("cuda", index) for index in range(2))
    one, two = Settings(tmp_path, devices[0]), Settings(tmp_path, devices[0], devices=devices)
    needs = estimate.estimate(spec, one).certain
    assert estimate.estimate(spec, two).total == estimate.estimate(spec, one).total
    monkeypatch.setattr(estimate, "free_bytes", lambda device: needs * 2 // 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"what helps: .*`--device-map auto`, which uses all GPUs"):
        refuse_unless_it_fits(spec, one)
    refuse_unless_it_fits(spec, two)
    assert "of memory on 2 cuda devices together" in of_all([spec], two, [2])[0]
    monkeypatch.setattr(estimate, "free_bytes", lambda device: needs // 3)
    with pytest.raises(UserError, match="2 cuda devices together") as refused:
        refuse_unless_it_fits(spec, two)
    assert "--device-map" not in str(refused.value)


@pytest.mark.parametrize("count", [1, 2])
def test_what_has_no_room_on_devices_is_said_to_stay_in_files(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = RunSpec.parse({"name": "one", "model": "diagram-llava", "task": {"name": "diagramqa", "limit": 2}})
    devices = tuple(torch.device("cuda", index) for index in range(count))
    one, all_of_them = Settings(tmp_path, devices[0]), Settings(tmp_path, devices[0], devices=devices)
    weights = estimate.estimate(spec, one).parts["weights"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(estimate, "free_bytes", lambda device: weights * 4 // 5 // count)
    helps = "uses all GPUs" if count > 1 else "leaves layers in files that the GPU has no room for"
    with pytest.raises(UserError, match=rf"what helps: .*`--device-map auto`, which {helps}"):
        refuse_unless_it_fits(spec, one)
    refuse_unless_it_fits(spec, all_of_them)
    found = estimate.estimate(spec, all_of_them)
    assert found.parts["weights"] + found.left == weights and found.left > weights / 5
    assert re.search(r"MB of weights stay in files, and every pass reads them;", of_all([spec], all_of_them, [2])[0])
    monkeypatch.setattr(estimate, "free_bytes", lambda device: weights // 8 // count)
    with pytest.raises(UserError, match="stay in files"):
        refuse_unless_it_fits(spec, all_of_them)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_one_model_serves_runs_that_leave_other_linears_in_files(
    order: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs in full precision leave what there is no room for, packed ones all that they pack; answers are the same."""
    folder = save_llava(tmp_path / "llava", layers=2)
    packed = {"quantize": {"method": "rtn", "weights": {"bits": 4}, "storage": "packed"}}
    task = {"name": "diagramqa", "limit": 2, "answers": "letter"}
    sections: list[dict[str, Any]] = [{}, {"prune": {"method": "divprune", "keep": 4}}, packed]
    specs = [RunSpec.parse({"name": str(at), "model": str(folder), "task": task, **sections[at]}) for at in order]
    plain = Settings(tmp_path / "plain", torch.device("cpu"))
    records = make_runs(specs, plain)
    total = sum(weight.nbytes for weight in load_model(specs[0], plain.device)[0].parameters())
    models: list[Any] = []

    def free(device: torch.device) -> int:
        held = [weight for model in models for weight in model.parameters() if not isinstance(weight, UnreadWeight)]
        return int(total * 0.9) - sum(weight.nbytes for weight in held)

    def load(spec: RunSpec, *args: Any) -> Any:
        models.append(load_model(spec, *args)[0])
        waiting.append(unread())
        return models[-1], load_processor(spec, plain.device)

    def unread() -> int:
        return sum(isinstance(weight, UnreadWeight) for weight in models[-1].parameters())

    waiting: list[int] = []
    monkeypatch.setattr(placement, "free_bytes", free)
    monkeypatch.setattr(session, "free_bytes", free)
    monkeypatch.setattr(session, "load_model", load)
    placed = replace(plain, runs=tmp_path / "placed", devices=(plain.device,))
    assert [one.run_id for one in make_runs(specs, placed)] == [one.run_id for one in records]
    assert len(models) == 1
    assert waiting[0] == (14 if order[0] == 2 else 7)
    assert 0 < unread() < 14
    for record in records:
        answers = [(runs / record.run_id / "answers.jsonl").read_bytes() for runs in (plain.runs, placed.runs)]
        assert answers[0] == answers[1]
