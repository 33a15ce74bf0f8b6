"""`qapbench cost`: the rows of a spec for a model that is not there."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import qapbench
from qapbench import UserError
from qapbench.cli import app

SPEC = """
name: two
model: nowhere/at-all
task: scienceqa
cases:
  dense: {}
  fastv 64:
    prune: {method: fastv, keep: 64}
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cost") / "two.yaml"
    path.write_text(SPEC, encoding="utf-8")
    return path


def test_every_run_of_a_spec_for_several_models(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = ["--model", "llava-1.5-7b", "--model", "qwen2.5-vl-7b"]
    done = CliRunner().invoke(app, ["cost", str(spec), *models, "--device", "a100", "--json"])
    rows = json.loads(done.stdout)
    assert [(row["model"], row["name"]) for row in rows] == [
        (model, name) for model in ("llava-1.5-7b", "qwen2.5-vl-7b") for name in ("dense", "fastv 64")
    ]
    said = qapbench.cost("llava-1.5-7b", {"prune": {"method": "fastv", "keep": 64}})
    assert rows[1]["flops"]["prefill"] == said.flops.prefill
    assert rows[1]["bounds"]["decode"] == {"seconds": said.bounds("a100")["decode"].seconds, "limit": "memory"}
    monkeypatch.setattr("qapbench.cli.costs.out", Console(width=200))
    shown = CliRunner().invoke(app, ["cost", str(spec), *models, "--device", "a100"]).stdout
    assert "fastv 64" in shown
    assert f"{said.flops.prompt / 1e12:.4g}" in shown


def test_one_run_is_summed_up_in_words() -> None:
    done = CliRunner().invoke(app, ["cost", "--model", "llava-1.5-7b", "--image", "336x336"])
    assert "visual tokens: 576 before pruning" in done.stdout
    assert "weights 14.13 GB" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cost"], "name a spec, or a model"),
        (["cost", "--model", "llava-1.5-7b", "--image", "big"], "WIDTHxHEIGHT"),
        (["cost", "--model", "llava-1.5-7b", "--after", "0"], "prompt.after"),
        (["cost", "--model", "llava-1.5-7b", "--device", "h10"], "did you mean 'h100'"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, UserError)
    assert message in str(error)
