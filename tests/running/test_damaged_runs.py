"""Runs whose files were damaged, or written by a newer qapbench, and sweeps in several processes."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qapbench
from qapbench import RunSpec, UserError
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
