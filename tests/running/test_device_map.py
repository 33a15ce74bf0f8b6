"""`--device-map`: which devices it stands for, what it excludes, and what a run needs on all of them together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from qapbench import UserError
from qapbench.cli import app
from qapbench.running import engines, estimate
from qapbench.running.engines import make_settings
from qapbench.running.estimate import of_all, refuse_unless_it_fits
from qapbench.running.settings import Settings
from qapbench.spec.run_spec import RunSpec

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
    assert (settings.devices, settings.held_on) == ((), (GPU,))


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
    spec = RunSpec.parse({"name": "one", "model": "diagram-llava", "task": {"name": "diagramqa", "limit": 2}})
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
