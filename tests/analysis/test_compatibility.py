"""`qapbench list --matrix`: every pruner on every family, found by running."""

import json
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qapbench import Pruner, Selection, UserError, pruners
from qapbench.analysis.compatibility import run_matrix
from qapbench.cli import app
from qapbench.models.family import families

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_pruner_meets_every_family_and_the_command_lists_it(monkeypatch: Any) -> None:
    cells = list(run_matrix())
    assert [(c.family, c.pruner) for c in cells] == [(f, p) for f in families.names() for p in pruners.names()]
    for cell in cells:
        assert cell.outcome != "failed", cell
        assert bool(cell.reason) == (cell.outcome == "refused")
        if cell.outcome == "runs":
            assert cell.tokens["mean"] < cell.tokens["available"]
    assert all(cell.outcome == "runs" for cell in cells if cell.family == "llava")
    monkeypatch.setattr("qapbench.analysis.compatibility.run_matrix", lambda: cells)
    run = CliRunner().invoke(app, ["list", "--matrix", "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout) == [cell.to_json() for cell in cells]
    monkeypatch.setattr("qapbench.cli.items.out", Console(width=200))
    table = CliRunner().invoke(app, ["list", "--matrix"])
    assert all(name in table.stdout for name in (*families.names(), *pruners.names()))
    monkeypatch.setattr("qapbench.cli.items.out", Console(width=60))
    narrow = CliRunner().invoke(app, ["list", "--matrix"])
    assert all(name in narrow.stdout for name in (*families.names(), *pruners.names()))
    tables = [line for line in narrow.stdout.splitlines() if line.startswith(("│", "┃"))]
    assert max(map(len, tables)) <= 60
    assert sum("┃ pruner" in line for line in tables) > 1
    for note in {note for cell in cells for note in cell.notes} | {cell.reason for cell in cells}:
        assert note in table.stdout


def test_refusals_and_faults_are_found(monkeypatch: Any) -> None:
    """One pruner that refuses and one that breaks; what they declare plays no part."""

    class Refusing(Pruner):
        def choose(self, tokens: Any, scores: Any, keep: int) -> Selection:
            raise UserError("not with these tokens")

    class Broken(Pruner):
        def choose(self, tokens: Any, scores: Any, keep: int) -> Selection:
            raise ZeroDivisionError("no tokens")

    made = {"refusing": Refusing, "broken": Broken}
    for name, target in made.items():
        pruners.register(name)(target)
    try:
        monkeypatch.setattr(pruners, "names", lambda: sorted(made))
        found = {(cell.pruner, cell.outcome, cell.reason) for cell in run_matrix()}
    finally:
        for name in made:
            del pruners._entries[name]
    assert found == {
        ("refusing", "refused", "not with these tokens"),
        ("broken", "failed", "ZeroDivisionError: no tokens"),
    }


def test_lists_as_json() -> None:
    run = CliRunner().invoke(app, ["list", "fusions", "--json"])
    assert {"convex", "rank"} <= {item["name"] for item in json.loads(run.stdout)}
