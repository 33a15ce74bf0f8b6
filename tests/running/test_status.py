"""`qapbench status`: how far runs are that this or another process makes."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_questions import QUESTIONS
from typer.testing import CliRunner

import qapbench
from qapbench import RunSpec, UserError
from qapbench.cli import app
from qapbench.records.progress_note import ProgressNote, RunProgress, note_path, notes_of
from qapbench.records.store import write_json
from qapbench.running import batches, status

Spec = Callable[..., dict[str, Any]]


def told(*arguments: object) -> Any:
    done = CliRunner().invoke(app, ["status", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_run_is_followed_while_it_is_made(spec_of: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said in the middle, when it is done, and when it failed in between."""
    said: list[Any] = []
    results = batches.BatchRunner.results

    def watched(self: Any, rows: Any, longest: int) -> Any:
        time.sleep(0.05)
        if not fails:
            said.append(told("first", "--runs", tmp_path))
        elif len(said) < 3:
            said.append(None)
        else:
            raise ZeroDivisionError("no more")
        return results(self, rows, longest)

    fails = True
    monkeypatch.setattr(batches.BatchRunner, "results", watched)
    monkeypatch.setattr(status, "EVERY", 0.01)
    specs = [RunSpec.parse({**spec_of(), "name": "first"})]
    with pytest.raises(ZeroDivisionError):
        qapbench.run(specs, tmp_path, batch_size=1)
    (run,), (command,) = (told("first", "--runs", tmp_path)[part] for part in ("runs", "commands"))
    assert (run["state"], run["total"]) == ("begun", QUESTIONS)
    assert 0 < run["answered"] < QUESTIONS
    assert command["ended"] == "ZeroDivisionError: no more"
    shown = CliRunner().invoke(app, ["status", run["run_id"][:6], "--runs", str(tmp_path)]).stdout
    assert f"{run['answered']} of {QUESTIONS}" in shown
    assert "it ended with: ZeroDivisionError: no more" in shown.replace("\n", " ")

    fails = False
    said.clear()
    (record,) = qapbench.run(specs, tmp_path, batch_size=1)
    states = [(one["runs"][0]["state"], one["runs"][0]["answered"]) for one in said]
    assert {state for state, _ in states} == {"running"}
    assert [answered for _, answered in states] == sorted(answered for _, answered in states)
    middle = said[-1]["commands"][0]
    assert middle["alive"]
    assert middle["questions_per_second"] > 0
    assert middle["seconds_left"] >= 0
    done = told(tmp_path / record.run_id)
    assert done == {
        "runs": [
            {"run_id": record.run_id, "name": "first", "state": "done", "answered": QUESTIONS, "total": QUESTIONS}
        ],
        "commands": [],
    }
    assert notes_of(tmp_path) == []


def noted(runs: Path, **more: Any) -> ProgressNote:
    note = ProgressNote(
        host="far",
        engine="ray",
        workers=64,
        started="2026-01-01T00:00:00+00:00",
        runs={f"{at}" * 16: RunProgress(name=f"row {at}", answered=100 * at, total=400) for at in range(3)},
        **{"pid": 7, "updated": time.time(), **more},
    )
    write_json(note_path(runs, note.host, note.pid), note)
    return note


def test_the_command_as_a_whole_says_speed_time_left_and_failures(tmp_path: Path) -> None:
    noted(tmp_path, questions_per_second=4.5, errors=["2026-01-01T00:01:00+00:00 node a: it [died]"])
    shown = CliRunner().invoke(app, ["status", "row 2", "--runs", str(tmp_path)]).stdout
    assert "200 of 400" in shown
    assert "row 1" not in shown
    assert "300 of 1200 answers, 4.5 questions/s, 3 min left; process 7 on far, engine ray, 64 worker(s)" in shown
    assert "node a: it [died]" in shown
    assert "failures.log" in shown
    noted(tmp_path, updated=time.time() - 100)
    shown = CliRunner().invoke(app, ["status", "--runs", str(tmp_path)]).stdout
    assert "not heard of for 100 s: the same command goes on from there" in shown
    assert "begun" in shown
    assert "row 1" in shown


def test_a_command_whose_runs_were_taken_up_again_is_not_told_of(tmp_path: Path) -> None:
    noted(tmp_path, pid=1, ended="KeyboardInterrupt", updated=time.time() - 50)
    noted(tmp_path, pid=2)
    assert [one["pid"] for one in told("--runs", tmp_path)["commands"]] == [2]
    noted(tmp_path, pid=3, updated=time.time() - 1)  # two at work on the same runs are both told of
    assert [one["pid"] for one in told("--runs", tmp_path)["commands"]] == [2, 3]
    only = {"a" * 16: RunProgress(name="another row", answered=1, total=400)}
    other = noted(tmp_path, pid=4, ended="KeyboardInterrupt").model_copy(update={"runs": only})
    write_json(note_path(tmp_path, other.host, other.pid), other)
    assert [one["pid"] for one in told("--runs", tmp_path)["commands"]] == [4, 2, 3]


def test_an_unknown_run_is_one_sentence(tmp_path: Path) -> None:
    noted(tmp_path)
    error = CliRunner().invoke(app, ["status", "row 9", "--runs", str(tmp_path)]).exception
    assert isinstance(error, UserError)
    assert "has no run 'row 9'; did you mean 'row" in str(error)
    error = CliRunner().invoke(app, ["status", "--runs", str(tmp_path / "none")]).exception
    assert isinstance(error, UserError)
    (tmp_path / ".progress-x-1.json").write_text("{")
    assert len(notes_of(tmp_path)) == 1
