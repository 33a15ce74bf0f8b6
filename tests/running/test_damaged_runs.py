"""Runs whose files were damaged, or written by a newer qapbench, and sweeps in several processes."""

import errno
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qapbench
from qapbench import RunSpec, UserError
from qapbench.cli import main
from qapbench.errors import RunFailedError
from qapbench.records.load import load_records
from qapbench.records.record import Record, read_record

Spec = Callable[..., dict[str, Any]]


def run(spec: dict[str, Any], runs: Path, **more: Any) -> Record:
    (record,) = qapbench.run(RunSpec.parse(spec), runs, **more)
    return record


def test_a_damaged_record_is_made_anew_from_the_answers(
    spec_of: Spec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = run(spec_of(), tmp_path)
    folder = tmp_path / record.run_id
    answers = (folder / "answers.jsonl").read_bytes()
    (folder / "record.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        again = run(spec_of(), tmp_path)
    assert "record.json" in caplog.text
    assert again.scores == record.scores
    assert again.timing.questions == 0
    assert (folder / "answers.jsonl").read_bytes() == answers
    assert read_record(folder) == again


def test_a_newer_record_is_kept_and_can_be_set_aside(spec_of: Spec, tmp_path: Path) -> None:
    record = run(spec_of(), tmp_path)
    file = tmp_path / record.run_id / "record.json"
    newer = json.dumps({**json.loads(file.read_text()), "schema": 99})
    file.write_text(newer)
    with pytest.raises(UserError, match=r"written by a newer qapbench.*--fresh"):
        run(spec_of(), tmp_path)
    assert file.read_text() == newer
    fresh = run(spec_of(), tmp_path, fresh=True)
    assert fresh.scores == record.scores
    assert (tmp_path / f"{record.run_id}.old1" / "record.json").read_text() == newer


def test_a_damaged_receipt_is_measured_again(spec_of: Spec, tmp_path: Path) -> None:
    spec = spec_of(quantize={"method": "rtn", "weights": {"bits": 4}})
    record = run(spec, tmp_path)
    folder = tmp_path / record.run_id
    receipt = (folder / "receipt.json").read_bytes()
    (folder / "record.json").unlink()
    (folder / "receipt.json").write_text("{")
    again = run(spec, tmp_path)
    assert again.timing.questions == 1
    assert again.receipt == record.receipt
    assert (folder / "receipt.json").read_bytes() == receipt


def test_workers_answer_the_embedded_task(spec_of: Spec, tmp_path: Path) -> None:
    """Its documents hold functions that no process can hand to another."""
    spec = {**spec_of(), "task": {"name": "diagramqa", "limit": 6}}
    alone, shared = (run(spec, tmp_path / str(workers), workers=workers) for workers in (1, 2))
    stored = [(tmp_path / str(n) / alone.run_id / "answers.jsonl").read_bytes() for n in (1, 2)]
    assert shared.run_id == alone.run_id
    assert stored[0] == stored[1]


FILES = ("answers.jsonl", "scored.jsonl", "receipt.json", "record.json")
PRUNED = {"quantize": {"method": "rtn", "weights": {"bits": 4}}, "prune": {"method": "random", "keep": 5}}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of a command, called in this process."""
    monkeypatch.setattr(sys, "argv", ["qapbench", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_a_damaged_finished_run_is_told_everywhere_and_mended_to_the_byte(
    spec_of: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For each file one damage of each kind, with all three commands."""
    runs = tmp_path / "runs"
    record, other = run(spec_of(**PRUNED), runs), run(spec_of(), runs)
    folder = runs / record.run_id
    whole = contents(folder)
    mend = f"mend it with `qapbench run {folder}/spec.json --runs {runs}`"
    kinds = {
        "one byte": lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:],
        "cut": lambda data: data[: len(data) // 2],
        "empty": lambda data: b"",
        "not UTF-8": lambda data: b"\xff" + data,
        "a list": lambda data: b"[1]\n",
        "no keys": lambda data: b"{}\n",
        "zeros": lambda data: data[:80] + b"\0" * 40 + data[120:],
        "missing": None,
        "folder": None,
    }
    for number, (name, (kind, change)) in enumerate((name, item) for name in FILES for item in kinds.items()):
        (folder / name).unlink()
        if change is not None:
            (folder / name).write_bytes(change(whole[name]))
        elif kind == "folder":
            (folder / name).mkdir()
        case = f"{name}: {kind}"
        capsys.readouterr()
        if not (kind == "missing" and name in ("receipt.json", "record.json")):
            compared = command(monkeypatch, "compare", folder, other.run_id, "--runs", runs, "--flips", 0)
            told = capsys.readouterr().err
            assert compared == (2 if name in ("scored.jsonl", "record.json") else 0), case
            assert name in told, case
            assert name == "record.json" or mend in told, case
            if number % 3 == 0:  # a page takes a second
                assert command(monkeypatch, "leaderboard", "--runs", runs, "--out", tmp_path / "board.html") == 0, case
        again = run(spec_of(**PRUNED), runs)
        assert again.scores == record.scores, case
        now = contents(folder)
        if name == "record.json":
            assert read_record(folder).made_alike(record), case
            whole = now
        assert now == whole, case
        assert not list(folder.glob("*.tmp")), case


def test_a_damaged_run_is_on_the_page_with_the_command_that_mends_it(
    spec_of: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records = [run(spec_of(**more), tmp_path) for more in (PRUNED, {})]
    for record, name in zip(records, ("scored.jsonl", "record.json"), strict=True):
        (tmp_path / record.run_id / name).write_text("{")
    page = tmp_path / "board.html"
    assert command(monkeypatch, "leaderboard", "--runs", tmp_path, "--out", page) == 0
    for record in records:
        assert f"mend it with `qapbench run {tmp_path / record.run_id}/spec.json --runs {tmp_path}`" in caplog.text
    assert "1 run has damaged files." in page.read_text()
    assert [record.run_id for record in load_records(tmp_path)] == [records[0].run_id]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_more_is_one_sentence_at_every_write(
    code: int,
    spec_of: Spec,
    write_spec: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The write that fails is each in turn; whatever it was, the next run ends with the bytes of an undisturbed one."""
    spec = write_spec(spec_of(**PRUNED))
    assert command(monkeypatch, "run", spec, "--runs", tmp_path / "left") == 0
    (left,) = load_records(tmp_path / "left")
    real, failing, tried = os.fsync, 1, 0

    def fsync(number: int) -> None:
        nonlocal tried
        tried += 1
        if tried >= failing:
            raise OSError(code, os.strerror(code))
        real(number)

    while True:
        runs, tried = tmp_path / str(failing), 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            ended = command(patch, "run", spec, "--runs", runs)
        said = capsys.readouterr().err
        assert not list(tmp_path.rglob("*.tmp"))
        if tried < failing:
            break
        assert ended == 1
        assert f"{os.strerror(code)}; what was stored before is kept" in said.replace("\n", " ")
        assert command(monkeypatch, "run", spec, "--runs", runs) == 0
        mine, theirs = contents(runs / left.run_id), contents(tmp_path / "left" / left.run_id)
        assert {name: mine[name] for name in FILES[:3]} == {name: theirs[name] for name in FILES[:3]}
        capsys.readouterr()
        failing += 1
    assert failing > 6, "spec, receipt, answers, their order, scores, record, page"


def test_a_worker_that_dies_stops_the_others_at_once(spec_of: Spec, tmp_path: Path) -> None:
    """Everything answered so far is kept."""

    def kill_one() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.05)
        os.kill(children[0].pid or 0, signal.SIGKILL)

    thread = threading.Thread(target=kill_one)
    thread.start()
    with pytest.raises(
        RunFailedError, match=r"a worker process died .killed by signal 9; .*run the same command again"
    ):
        run(spec_of(), tmp_path, workers=2)
    thread.join()
    assert multiprocessing.active_children() == []
    assert run(spec_of(), tmp_path).scores == run(spec_of(), tmp_path / "alone").scores
