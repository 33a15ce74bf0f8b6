"""`qapbench new`: what it writes works as it is, and nothing of the user's is overwritten."""

from pathlib import Path
from typing import get_args

import cli_process
import pytest
from typer.testing import CliRunner

from qapbench import UserError
from qapbench.cli import app
from qapbench.cli.scaffold import Kind
from qapbench.spec.yaml_reader import read_yaml


def test_every_kind_is_written_with_a_spec_and_a_test_that_passes(tmp_path: Path) -> None:
    for kind in get_args(Kind):
        made = CliRunner().invoke(app, ["new", kind, f"my_{kind}", "--folder", str(tmp_path)])
        assert made.exit_code == 0, made.output
        assert f"my_{kind}" in str(read_yaml(tmp_path / f"my_{kind}.yaml")[0])
    assert len(list(tmp_path.iterdir())) == 3 * len(get_args(Kind))
    # In a process of its own, so that what the plugins register stays out of this one.
    done = cli_process.pytest("-q", "-p", "no:cacheprovider", "-p", "no:xdist", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert f"{len(get_args(Kind))} passed" in done.stdout


@pytest.mark.parametrize(
    ("kind", "name", "says"),
    [
        ("metrik", "mine", "did you mean 'metric'"),
        ("metric", "two words", "no Python name, such as my_metric"),
        ("metric", "class", "no Python name"),
        ("pruner", "cdpruner", "registered already, by"),
        ("quantizer", "group", "metric 'group_error' is registered already, by"),
    ],
)
def test_mistakes_are_named(kind: str, name: str, says: str, tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["new", kind, name, "--folder", str(tmp_path)]).exception
    assert isinstance(found, UserError)
    assert says in str(found)
    assert not list(tmp_path.iterdir())


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text("the user's")
    found = CliRunner().invoke(app, ["new", "metric", "mine", "--folder", str(tmp_path)]).exception
    assert isinstance(found, UserError)
    assert "is there already" in str(found)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("test_mine.py", "the user's")]
