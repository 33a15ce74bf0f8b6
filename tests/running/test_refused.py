"""Questions whose pictures a model's processor does not accept: the others are answered, and it is said everywhere."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from family_checkpoints import picture_of, save_family
from run_questions import encoded, row
from typer.testing import CliRunner

import qapbench
from qapbench import RunSpec, UserError
from qapbench.analysis import paired
from qapbench.analysis.check import check_record
from qapbench.analysis.explain import explain
from qapbench.cli import app, main
from qapbench.errors import RunFailedError
from qapbench.leaderboard.ranking import compared, scored_runs
from qapbench.leaderboard.rows import from_record
from qapbench.records.record import Record, write_record
from qapbench.records.store import answers_of
from qapbench.running.planner import Planner
from qapbench.running.session import Session
from qapbench.running.settings import Settings, find_device
from qapbench.spec.run_spec import CalibrationSpec
from qapbench.tasking.calibration_samples import samples

pytestmark = pytest.mark.usefixtures("one_thread")
SLIM = (300, 1)  # Qwen's processor accepts a ratio of up to 200
REFUSED = ["q2", "q6"]
LONG = " What is this?" * 9  # the longest prompt is asked first, and receipts are measured with the first question
PRUNES: dict[str, Any] = {
    "dense": None,
    "random": {"method": "random", "keep": 4},
    "fastv": {"method": "fastv", "keep": 4},
}


def data(path: Path, refused: list[str] = REFUSED, count: int = 14) -> Path:
    rows = [row(index) for index in range(count)]
    for one in rows:
        if one["pid"] in refused:
            one["image"] = {"bytes": encoded(picture_of(SLIM, 0)), "path": None}
            one["question"] += LONG
    pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family("qwen2_5_vl", tmp_path_factory.mktemp("qwen") / "model")


def specs_of(model: Path, questions: Path, names: tuple[str, ...] = tuple(PRUNES), **task: Any) -> list[RunSpec]:
    asked = {"name": "scienceqa", "data": str(questions), **task}
    return [RunSpec.parse({"name": name, "model": str(model), "task": asked, "prune": PRUNES[name]}) for name in names]


@pytest.fixture(scope="module")
def made(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record], list[str], list[RunSpec]]:
    """Folder, records, what was told, specs."""
    folder = tmp_path_factory.mktemp("made")
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda message: told.append(message.getMessage())  # type: ignore[method-assign]
    logging.getLogger("qapbench").addHandler(handler)
    specs = specs_of(qwen, data(folder / "test.parquet"))
    try:
        records = qapbench.run(specs, folder / "runs", device="cpu")
    finally:
        logging.getLogger("qapbench").removeHandler(handler)
    return folder / "runs", records, told, specs


def stored(runs: Path, record: Record) -> dict[str, bytes]:
    names = ("answers.jsonl", "scored.jsonl", "receipt.json")
    return {name: (runs / record.run_id / name).read_bytes() for name in names}


def test_the_others_are_answered_and_each_is_told_once(made: Any) -> None:
    runs, records, told, _ = made
    for record in records:
        assert [one.id for one in record.unanswered] == REFUSED
        assert [one.doc for one in record.unanswered] == [2, 6]
        assert record.task is not None
        assert record.task.questions == 12
        assert record.scores.columns[-1].n == 12
        assert {answer.id for answer in answers_of(runs / record.run_id).read()}.isdisjoint(REFUSED)
        assert sum("Not answered: 2 questions" in note and "'q2', 'q6'" in note for note in record.notes) == 1
    why = "the model's processor refuses a picture of 300 x 1 pixels (absolute aspect ratio must be smaller than 200"
    assert sorted(line for line in told if "not answered" in line) == [
        f"question '{name}' is not answered: {why}, got 300.0)" for name in REFUSED
    ]


@pytest.mark.parametrize("more", [{"workers": 2}, {"batch_size": 1}])
def test_the_bytes_depend_on_nothing_else(made: Any, tmp_path: Path, more: dict[str, Any], capfd: Any) -> None:
    runs, records, _, specs = made
    again = qapbench.run(specs[1:2], tmp_path, device="cpu", **more)
    assert stored(tmp_path, again[0]) == stored(runs, records[1])
    assert again[0].unanswered == records[1].unanswered
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_goes_on_and_is_mended_the_same_way(made: Any, tmp_path: Path) -> None:
    runs, records, _, specs = made
    folder = tmp_path / records[1].run_id
    folder.mkdir()
    lines = stored(runs, records[1])["answers.jsonl"].splitlines(keepends=True)
    (folder / "answers.jsonl").write_bytes(b"".join(lines[3:7]))
    (again,) = qapbench.run(specs[1:2], tmp_path, device="cpu")
    assert stored(tmp_path, again) == stored(runs, records[1])
    record = (folder / "record.json").read_bytes()
    (folder / "scored.jsonl").unlink()
    qapbench.run(specs[1:2], tmp_path, device="cpu")
    assert (folder / "record.json").read_bytes() == record
    plan = Planner(tmp_path, find_device("cpu")).plan(specs[1])
    assert (plan.state, plan.answered, plan.total) == ("done", 12, 14)


def test_a_subset_measures_the_receipt_too(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, records, _, specs = made
    monkeypatch.setattr("qapbench.running.fast.LEAST", 3)
    again = qapbench.run(specs, tmp_path, device="cpu", fast=True)
    assert [stored(tmp_path, record) for record in again] == [stored(runs, record) for record in records]


def test_the_page_and_the_check_say_how_many(made: Any) -> None:
    runs, records, _, _ = made
    rows = compared([from_record(record) for record in records], scored_runs(records, runs, []))
    assert [(row.unanswered, row.among) for row in rows] == [(2, 3)] * 3
    passed = check_record(runs / records[0].run_id).passed
    assert any("12 stored answers" in line and "2 could not be asked" in line for line in passed)


def test_a_record_cannot_leave_out_what_it_likes(made: Any, tmp_path: Path) -> None:
    """Who submits a record cannot drop the questions that went wrong."""
    runs, records, _, _ = made
    record = records[0]
    others = [answer for answer in answers_of(runs / record.run_id).read() if answer.images is None][:1]
    gone = [{"id": answer.id, "doc": answer.doc, "why": "no"} for answer in others]
    (tmp_path / record.run_id).mkdir()
    lines = stored(runs, record)["answers.jsonl"].splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["id"] not in {one["id"] for one in gone}]
    (tmp_path / record.run_id / "answers.jsonl").write_bytes(b"".join(kept))
    forged = Record.model_validate({**record.to_json(), "files": {}})
    listed = [*(one.model_dump() for one in record.unanswered), *gone]
    write_record(tmp_path / record.run_id, Record.model_validate({**forged.to_json(), "unanswered": listed}))
    with pytest.raises(UserError, match="without an image can be asked"):
        check_record(tmp_path / record.run_id)


def test_statistics_pair_what_both_answered(made: Any, tmp_path: Path) -> None:
    """Against a model whose processor takes every picture."""
    runs, records, _, _ = made
    folder = save_family("llava_onevision", tmp_path / "onevision")
    (other,) = qapbench.run(specs_of(folder, runs.parent / "test.parquet", ("dense",)), runs, device="cpu")
    assert other.unanswered == []
    assert "unanswered" not in other.to_json()
    one, two = (paired.read_scored(runs / record.run_id) for record in (records[0], other))
    comparison = paired.compare(one, two)
    assert [difference.n for difference in comparison.differences][-1] == 12
    assert comparison.alone == 2
    assert not {*comparison.gained, *comparison.lost} & {*REFUSED}
    rows = compared([from_record(r) for r in (*records, other)], scored_runs([*records, other], runs, []))
    assert [(row.among, row.left_out) for row in rows] == [(4, 2)] * 4
    said = CliRunner().invoke(app, ["compare", records[0].run_id, other.run_id, "--runs", str(runs)]).stdout
    assert "2 that only one of them answered left out" in said.replace("\n", " ")
    assert "Not answered: 2 questions" in said


def test_many_refusals_stop_the_run(qwen: Path, tmp_path: Path) -> None:
    refused = [f"q{index}" for index in range(0, 12, 2)]
    specs = specs_of(qwen, data(tmp_path / "test.parquet", refused), ("dense",))
    with pytest.raises(RunFailedError, match=r"refuses the pictures of 6 of 14 questions") as caught:
        qapbench.run(specs, tmp_path / "runs", device="cpu")
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.glob("runs/*/record.json"))


def test_nothing_left_to_ask_stops_the_run(qwen: Path, tmp_path: Path) -> None:
    specs = specs_of(qwen, data(tmp_path / "test.parquet", ["q0"], count=1), ("dense",))
    with pytest.raises(RunFailedError, match=r"refuses the pictures of 1 of 1 questions"):
        qapbench.run(specs, tmp_path / "runs", device="cpu")


def test_explaining_it_is_one_sentence(made: Any) -> None:
    pruned = {"method": "attention", "keep": 4, "sensitivity": "combined"}
    spec = RunSpec.parse({**made[3][0].model_dump(exclude={"prune"}), "prune": pruned})
    with pytest.raises(UserError, match="question 'q2': the model's processor refuses"):
        explain(spec, "q2", Session(Settings(made[0], find_device("cpu"))))


def test_calibration_leaves_them_out_and_says_so(qwen: Path, tmp_path: Path) -> None:
    (spec,) = specs_of(qwen, data(tmp_path / "test.parquet"), ("dense",))
    session = Session(Settings(tmp_path, find_device("cpu")))
    wanted = CalibrationSpec(samples=14, data=str(data(tmp_path / "train.parquet")))
    made = samples(session.task(spec), wanted, session.processor(spec))
    assert len(made.samples) == 12
    assert "5 with an image; 2 left out, whose pictures the model's processor refuses" in made.origin
    nothing = CalibrationSpec(samples=1, data=str(data(tmp_path / "one.parquet", ["q0"], count=1)))
    with pytest.raises(UserError, match="none of 1 samples can be used"):
        samples(session.task(spec), nothing, session.processor(spec))


def test_a_study_of_a_refused_question_ends_with_a_sentence(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and one line that names the question and says what to do; `explain` ends likewise."""
    (spec,) = specs_of(qwen, data(tmp_path / "test.parquet", count=4), ("random",))
    raw = spec.model_dump(mode="json", exclude={"quantize", "prune"})
    raw["prune"] = {"method": "random", "keep": 4, "sensitivity": "l2"}
    raw["quantize"] = {"method": "rtn", "weights": {"bits": 4}}
    (tmp_path / "spec.json").write_text(json.dumps(raw))
    runs = ["--runs", str(tmp_path / "runs"), "--device", "cpu"]
    advice = "; a study needs all of its questions, so leave this one out of the data"
    commands = {
        advice: ["study", "sensitivity", str(tmp_path / "spec.json"), *runs],
        "": ["explain", str(tmp_path / "spec.json"), "--sample", "q2", "--out", str(tmp_path / "out.png"), *runs],
    }
    for end, command in commands.items():
        monkeypatch.setattr(sys, "argv", ["qapbench", *command])
        with pytest.raises(SystemExit) as stopped:
            main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert stopped.value.code == 2
        assert len(lines) == 1 and lines[0].startswith("error: question 'q2': the model's processor refuses a picture")
        assert lines[0].endswith(f"got 300.0){end}")
