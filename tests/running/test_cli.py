"""The real command, in a process of its own."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_process import qapbench, started
from run_questions import QUESTIONS

import qapbench as package
from qapbench.spec.spec_file import load_spec

Spec = Callable[..., dict[str, Any]]
Write = Callable[[dict[str, Any]], Path]
METRIC = '''from qapbench import metric

@metric("median_magnitude")
def median_magnitude(tokens, power: float = 1.0):
    """Median over channels of |x|^power."""
    return (tokens.abs() ** power).median(dim=-1).values
'''


def test_run_prints_a_table_and_writes_the_page(spec_of: Spec, write_spec: Write, tmp_path: Path) -> None:
    spec = write_spec({**spec_of(), "cases": {"full": {}, "pruned": {"prune": {"method": "random", "keep": 4}}}})
    done = qapbench("run", spec, "--runs", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    assert "pruned" in done.stdout
    assert "Avg" in done.stdout
    page = tmp_path / "runs" / "leaderboard.html"
    assert page.exists()
    assert str(page) in done.stdout
    again = qapbench("run", spec, "--runs", tmp_path / "runs", "--dry-run")
    assert again.stdout.count(f"{QUESTIONS} of {QUESTIONS}") == 2
    new = qapbench("run", spec, "--runs", tmp_path / "runs", "--dry-run", "--set", "task.limit=5")
    assert new.stdout.count("0 of 5") == 2


def test_a_metric_of_five_lines_beside_a_spec(spec_of: Spec, write_spec: Write, tmp_path: Path) -> None:
    (tmp_path / "my_metric.py").write_text(METRIC)
    prune = {"method": "attention", "keep": 4, "sensitivity": {"median_magnitude": {"power": 2.0}}}
    spec = write_spec({**spec_of(prune=prune), "plugins": ["my_metric.py"]})
    done = qapbench("run", spec, "--runs", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/record.json"))
    assert record["spec"]["prune"]["sensitivity"] == {"median_magnitude": {"power": 2.0}}
    assert "plugin 0 my_metric.py" in record["fingerprints"]


def test_five_mistakes_are_five_lines(tmp_path: Path) -> None:
    spec = tmp_path / "bad.yaml"
    spec.write_text(
        "model: diagram-llava\n"
        "task: {name: diagramqa, limt: 5}\n"
        "quantize: {method: rtn, weights: {bits: 99}, scope: [langage]}\n"
        "prune:\n"
        "  method: {cdpruner: {relevance_sing: positive}}\n"
        "  keep: 32\n"
        "  sensitivity: combind\n"
    )
    done = qapbench("validate", spec)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: line 2: task.limt: unknown field; did you mean 'limit'?",
        "error: line 3: quantize.weights.bits: input should be less than or equal to 8 (got 99)",
        "error: line 3: quantize.scope.0: input should be 'language', 'projector' or 'vision' (got 'langage')",
        "error: line 5: prune.method.cdpruner.relevance_sing: unknown field of pruner 'cdpruner'; "
        "did you mean 'relevance_sign'?",
        "error: line 7: prune.sensitivity: no metric 'combind'; did you mean 'combined'?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "not valid YAML"),
        ("- a\n- b\n", "a spec is a mapping"),
        ("model: x\nmodel: y\n", "line 2: model: given twice, first in line 1"),
        ("model: !!python/object/apply:os.system ['true']\n", "a spec holds only text, numbers"),
        ("model: diagram-llava\n", "task: this field is required"),
        ("model: diagram-llava\ntask: diagramqa\nplugins: [none.py]\n", "line 3: plugins.0: no such plugin file"),
    ],
)
def test_unreadable_specs(text: str, message: str, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(text)
    done = qapbench("run", spec, "--runs", tmp_path / "runs")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_not_there_is_told_at_once_with_lines(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "model: diagram-llaav\ntask: {name: diagramqaa}\ncases:\n  one: {prune: {method: random, keep: 0}}\n"
        "  two:\n    prune.method: random\n    prune.keeep: 3\n"
    )
    done = qapbench("validate", spec)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert any("line 1: model: no embedded model or folder 'diagram-llaav'" in line for line in lines), lines
    assert any("line 2: task.name: unknown task 'diagramqaa'" in line for line in lines), lines
    assert len(lines) == len(set(lines))
    assert any("line 4: prune.keep:" in line for line in lines), lines
    assert any("line 7: prune.keeep: unknown field" in line for line in lines), lines
    spec.write_text("model: diagram-llaav\ntask: {name: diagramqaa}\nname: 2026-11-22\n")
    done = qapbench("run", spec, "--runs", tmp_path / "runs")
    assert done.returncode == 2
    assert [line.partition(";")[0] for line in done.stderr.splitlines()] == [
        "error: line 1: model: no embedded model or folder 'diagram-llaav'",
        "error: line 2: task.name: unknown task 'diagramqaa'",
    ]
    done = qapbench("validate", "quickstart", "--set", "task.limit=abc")
    assert "line" not in done.stderr
    assert "(from --set task.limit)" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "quickstart", "--device", "cuda:7"], "this machine has no 'cuda:7'"),
        (["run", "quickstart", "--out", "board.txt"], "the page is an .html file"),
        (["run", "quickstart", "--runs", "/dev/null"], "/dev/null"),
        (["run", "quickstrt"], "did you mean 'quickstart'"),
        (["run"], "Missing argument"),
        (["run", "quickstart", "--workers", "0"], "--workers"),
        (["run", "quickstart", "--engine", "rya"], "ray"),
        (["run", "quickstart", "--address", "auto"], "add --engine ray"),
        (["score", "/nowhere.json", "--task", "diagramqa"], "cannot be read"),
        (["compare", "a", "b", "--runs", "/nowhere"], "no run 'a'"),
        (["list", "prunners"], "did you mean 'pruner'"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    done = qapbench(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_kill_9_in_a_sweep_and_go_on(tmp_path: Path) -> None:
    """Killed in the middle, started again: the same bytes, cell by cell, as a sweep that was left alone."""
    limit = 16  # two batches: a fast machine writes all runs' answers of one before anybody looks
    arguments = ["run", "quickstart", "--set", f"task.limit={limit}"]
    process = started(*arguments, "--runs", tmp_path / "killed")
    deadline = time.monotonic() + 120
    while _lines(tmp_path / "killed") < 14 and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.join()
    whole = limit * len(load_spec("quickstart"))
    assert 14 <= _lines(tmp_path / "killed") < whole
    assert not list((tmp_path / "killed").glob("*/record.json"))
    plan = qapbench(*arguments, "--runs", tmp_path / "killed", "--dry-run")
    assert "answers are missing" in plan.stdout
    assert "the tower runs" in plan.stdout
    assert qapbench(*arguments, "--runs", tmp_path / "killed").returncode == 0
    package.run(load_spec("quickstart", [f"task.limit={limit}"]), tmp_path / "left", device="cpu")
    killed, left = (
        {path.parent.name: path.read_bytes() for path in (tmp_path / name).glob("*/answers.jsonl")}
        for name in ("killed", "left")
    )
    assert killed == left
    assert _lines(tmp_path / "killed") == whole


def _lines(runs: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in runs.glob("*/answers.jsonl"))


def test_list_show_and_leaderboard(spec_of: Spec, write_spec: Write, tmp_path: Path) -> None:
    listed = qapbench("list", "pruners")
    assert listed.returncode == 0
    assert "cdpruner" in listed.stdout
    shown = qapbench("show", "metric", "clip_error")
    assert shown.returncode == 0
    for word in ("percentile", "number", "99", "Source"):  # the parameter, its type, its default, the paper
        assert word in shown.stdout
    wrong = qapbench("show", "metric", "l3")
    assert wrong.returncode == 2
    assert "did you mean 'l1'" in wrong.stderr or "did you mean 'l2'" in wrong.stderr
    empty = qapbench("leaderboard", "--runs", tmp_path / "none")
    assert empty.returncode == 2
    assert "no records below" in empty.stderr
    assert qapbench("run", write_spec(spec_of()), "--runs", tmp_path / "runs").returncode == 0
    page = tmp_path / "board.html"
    assert qapbench("leaderboard", "--runs", tmp_path / "runs", "--out", page).returncode == 0
    assert page.stat().st_size > 10_000


def test_scoring_stored_answers_gives_the_runs_own_table(spec_of: Spec, write_spec: Write, tmp_path: Path) -> None:
    spec = write_spec(spec_of(task={"answers": "generate"}))
    assert qapbench("run", spec, "--runs", tmp_path / "runs").returncode == 0
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/record.json"))
    (stored,) = (tmp_path / "runs").glob("*/answers.jsonl")
    task = spec_of()["task"]
    done = qapbench("score", stored, "--task", task["name"], "--data", task["data"], "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["columns"] == record["scores"]["columns"]
