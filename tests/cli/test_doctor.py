"""`qapbench doctor`: what is needed and broken makes it fail, what is optional and missing does not."""

import json
from importlib.metadata import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qapbench.cli import app
from qapbench.cli import doctor as module
from qapbench.methods import plugins


def test_everything_that_the_package_needs_is_looked_at() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {"torch", "transformers", "lm-eval", "pydantic"} <= {one["name"] for one in found}
    assert {one["about"] for one in found} == {"packages", "devices", "folders", "plugins", "extras"}
    assert all(one["says"] for one in found)
    assert "strategies" in CliRunner().invoke(app, ["doctor"]).stdout


def test_every_extra_says_what_it_unlocks() -> None:
    assert set(metadata("qapbench").get_all("Provides-Extra") or []) == set(module.EXTRAS)


def test_a_package_outside_its_range_fails_with_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"scipy": "1.0", "torchao": "0.1"}
    monkeypatch.setattr(module, "version", lambda name: found.get(name) or metadata(name)["Version"])
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 1
    wrong = {one["name"]: one for one in json.loads(done.stdout) if one["state"] != "ok"}
    assert wrong["scipy"]["state"] == "broken"
    assert "1.0 is installed, and >=1.13 is needed; pip install 'scipy>=1.13'" in wrong["scipy"]["says"]
    assert wrong["torchao"]["state"] == "missing"
    assert "pip install 'qapbench[torchao]'" in wrong["torchao"]["says"]


def test_a_folder_that_cannot_be_written_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module.os, "access", lambda place, mode: False)
    assert [one.state for one in module._folders()] == ["broken", "broken"]
    assert module._folder("cache", tmp_path / "below" / "it", "things").says == (
        f"{tmp_path / 'below' / 'it'} cannot be written to (things)"
    )


def test_a_broken_plugin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plugins._broken, "tasks", "fails in line 3")
    broken = [one for one in module._plugins() if one.state == "broken"]
    assert [(one.name, one.says) for one in broken] == [("tasks", "fails in line 3")]
