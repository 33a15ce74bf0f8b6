"""What a command does not need is not imported: looked up in `sys.modules` of the real command."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import qapbench
from qapbench import RunSpec

Spec = Callable[..., dict[str, Any]]
HEAVY = ("torch", "pandas", "transformers", "lm_eval", "lmms_eval", "ray")
PROGRAM = f"""
import json, sys
from qapbench.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv, code = ["qapbench", *words], 0
    try:
        main()
    except SystemExit as exit:
        code = exit.code or 0
    print(json.dumps([code, [name for name in {HEAVY!r} if name in sys.modules]]), file=sys.stderr)
"""


def imported(*commands: list[object], folder: Path) -> list[list[str]]:
    """Run commands in a new process, one after the other, and return which heavy packages there are after each.

    What one imported stays for the next, so a package that is not there in the end was imported by none.
    """
    words = json.dumps([list(map(str, command)) for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, words], capture_output=True, text=True, cwd=folder, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("[")]
    assert [code for code, _ in said] == [0] * len(commands), done.stderr
    return [found for _, found in said]


def test_help_needs_no_torch(tmp_path: Path) -> None:
    assert imported(["--help"], ["--version"], ["run", "--help"], folder=tmp_path) == [[]] * 3


def test_commands_without_a_model_start_without_transformers_and_lm_eval(tmp_path: Path) -> None:
    commands: list[list[object]] = [
        ["list"],
        ["show", "pruner", "cdpruner"],
        ["validate", "quickstart"],
        ["run", "quickstart", "--dry-run"],
    ]
    assert imported(*commands, folder=tmp_path) == [["torch"]] * 4


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
    reading: list[list[object]] = [
        ["leaderboard", "--runs", runs, "--out", tmp_path / "board.html"],
        ["compare", "dense", "random", "--runs", runs],
    ]
    assert imported(*reading, folder=tmp_path) == [[]] * 2
    commands: list[list[object]] = [["run", spec, "--runs", runs], *reading, ["status", "--runs", runs]]
    assert imported(*commands, folder=tmp_path) == [["torch"]] * 4
