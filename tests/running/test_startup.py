"""What a command does not need is not imported: looked up in `sys.modules` of the real command."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qapbench
from qapbench import RunSpec

Spec = Callable[..., dict[str, Any]]
HEAVY = ("torch", "pandas", "transformers", "lm_eval", "lmms_eval", "ray")
PROGRAM = f"""
import json, sys
from qapbench.cli import main
code = 0
try:
    main()
except SystemExit as exit:
    code = exit.code or 0
print(json.dumps([code, [name for name in {HEAVY!r} if name in sys.modules]]))
"""


def imported(*arguments: object, folder: Path) -> list[str]:
    """Run a command in a process of its own and return which heavy packages it imported."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == 0, done.stderr
    code, found = json.loads(done.stdout.strip().splitlines()[-1])
    assert code == 0, done.stderr
    return found


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]])
def test_help_needs_no_torch(arguments: list[str], tmp_path: Path) -> None:
    assert imported(*arguments, folder=tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        ["show", "pruner", "cdpruner"],
        ["validate", "quickstart"],
        ["run", "quickstart", "--dry-run"],
    ],
)
def test_commands_without_a_model_start_without_transformers_and_lm_eval(arguments: list[str], tmp_path: Path) -> None:
    assert imported(*arguments, folder=tmp_path) == ["torch"]


def test_a_finished_run_and_what_reads_it_need_neither(
    spec_of: Spec, write_spec: Callable[[dict[str, Any]], Path], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    specs = [
        {**spec_of(), "name": "dense"},
        {**spec_of(prune={"method": "random", "keep": 5}), "name": "random"},
    ]
    qapbench.run([RunSpec.parse(spec) for spec in specs], runs)
    cases = {"dense": {}, "random": {"prune": {"method": "random", "keep": 5}}}
    spec = write_spec({**spec_of(), "cases": cases})
    assert imported("run", spec, "--runs", runs, folder=tmp_path) == ["torch"]
    assert imported("leaderboard", "--runs", runs, "--out", tmp_path / "board.html", folder=tmp_path) == ["torch"]
    assert imported("status", "--runs", runs, folder=tmp_path) == ["torch"]
    assert imported("compare", "dense", "random", "--runs", runs, folder=tmp_path) == ["torch"]
