"""Runs: stores, resumes, shares, and never depends on how it was batched."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_questions import QUESTIONS

import qapbench
from qapbench import RunSpec, UserError
from qapbench.quantize.receipts import NotQuantizedError
from qapbench.records.load import load_records
from qapbench.records.parts import ColumnScore, TokenCounts
from qapbench.records.record import Record, read_record
from qapbench.records.store import answers_of
from qapbench.running.planner import Planner
from qapbench.running.settings import find_device

Spec = Callable[..., dict[str, Any]]
W4A4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 16}, "activations": {"bits": 4, "group_size": 16}}
PRUNE = {"method": "cdpruner", "keep": 5, "sensitivity": "combined"}


def run(spec: dict[str, Any], runs: Path, **more: Any) -> Record:
    (record,) = qapbench.run(RunSpec.parse(spec), runs, **more)
    return record


def answers(runs: Path, record: Record) -> bytes:
    return (runs / record.run_id / "answers.jsonl").read_bytes()


def column(record: Record, name: str) -> ColumnScore:
    found = record.scores.column(name)
    assert found is not None
    return found


def test_a_record_says_what_was_done(spec_of: Spec, tmp_path: Path) -> None:
    record = run(spec_of(quantize=W4A4, prune=PRUNE), tmp_path)
    assert column(record, "Avg").n == QUESTIONS
    assert column(record, "IMG").n == 7
    assert record.tokens == TokenCounts(images=7, available=16, mean=5, min=5, max=5, kept=5, merged=0)
    assert record.receipt.summary.startswith("rtn: W4A4 at 14 of 14 linears (language); cdpruner 5 + combined")
    assert set(record.fingerprints) == {
        "model",
        "data",
        "precision",
        "text_tower",
        "text_tower sign",
        "ptq rtn",
        "pruner cdpruner",
        "metric combined",
        "fusion convex",
        "family llava",
        "task scienceqa",
        "library torch",
        "library transformers",
        "library lm-eval",
    }
    assert record.fingerprints["precision"] == "float32 on cpu"
    assert record.to_json()["environment"]["torch"] == torch.__version__
    assert record.spec["quantize"]["weights"] == {
        "bits": 4,
        "group_size": 16,
        "symmetric": False,
        "granularity": "row",
        "divisor": "qmax",
        "zero_point": "in_range",
    }
    assert record.task is not None
    assert record.task.chance == pytest.approx((7 / 2 + 7 / 3) / QUESTIONS)
    assert record.notes == []
    lines = answers(tmp_path, record).splitlines()
    assert len(lines) == QUESTIONS
    assert {len(image["kept"]) for line in lines for image in json.loads(line).get("images", [])} == {5}
    assert load_records(tmp_path) == [record]
    stored = json.loads((tmp_path / record.run_id / "record.json").read_text())
    assert {key: value for key, value in stored.items() if key != "check"} == record.to_json()


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "omniquant", "mbq", "quip"])
def test_answers_of_packed_weights_are_the_same_bytes(
    method: str, spec_of: Spec, questions: Path, tmp_path: Path
) -> None:
    quick = {method: {"epochs": 1}} if method == "omniquant" else method
    quantize = {**W4A4, "method": quick, "calibration": {"samples": 2, "data": str(questions)}}
    plain, packed = (
        run(spec_of(quantize={**quantize, "storage": storage}, dtype="bfloat16"), tmp_path)
        for storage in ("unpacked", "packed")
    )
    assert plain.run_id != packed.run_id
    assert answers(tmp_path, plain) == answers(tmp_path, packed)
    assert all(line.stored_bytes and 4 < (line.stored_bits or 0) < 16 for line in packed.receipt.linears)
    assert "stored packed: " in packed.receipt.summary
    stored = json.loads((tmp_path / plain.run_id / "record.json").read_text())
    assert "stored_bytes" not in stored["receipt"]["linears"][0]


def test_what_version_0_1_wrote_works_and_warns(spec_of: Spec, tmp_path: Path) -> None:
    """Records as dictionaries, and `report`: for one more version."""
    told: list[tuple[str, int, int]] = []
    with pytest.warns(DeprecationWarning, match=r"run\(report=\.\.\.\) is now run\(progress=\.\.\.\)") as caught:
        record = run(spec_of(), tmp_path, report=lambda *said: told.append(said))
    assert told[0] == ("t", 0, QUESTIONS)
    assert told[-1] == ("t", QUESTIONS, QUESTIONS)
    assert __file__ in [warning.filename for warning in caught]
    with pytest.warns(DeprecationWarning, match=r"record\.name, not record\['name'\]") as caught:
        assert record["name"] == record.name == "t"
        assert record["scores"]["columns"][-1]["k"] == column(record, "Avg").k
        assert record.get("run_id") == record.run_id
        assert record["schema"] == record.schema_version
        assert record.get("stopped", "whole") == "whole"
        with pytest.raises(KeyError):
            record["stopped"]
    assert [warning.filename for warning in caught] == [__file__] * 6, "each warning is of the caller's line"
    assert "stopped" not in record


def test_progress_is_told_run_by_run(spec_of: Spec, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    run(spec_of(name="mine"), tmp_path, progress=lambda *said: told.append(said))
    assert told[0] == ("mine", 0, QUESTIONS)
    assert told[-1] == ("mine", QUESTIONS, QUESTIONS)
    told.clear()
    run(spec_of(name="mine"), tmp_path, progress=lambda *said: told.append(said))
    assert told == [("mine", QUESTIONS, QUESTIONS)]


def test_a_done_run_is_read_and_a_fresh_one_sets_it_aside(spec_of: Spec, tmp_path: Path) -> None:
    first = run(spec_of(), tmp_path)
    again = run({**spec_of(), "name": "another name"}, tmp_path)
    assert again == first.model_copy(update={"name": "another name"})
    fresh = run(spec_of(), tmp_path, fresh=True)
    assert fresh.run_id == first.run_id
    kept = tmp_path / f"{first.run_id}.old1"
    assert read_record(kept) == first
    assert answers(tmp_path, fresh) == (kept / "answers.jsonl").read_bytes()
    assert len(load_records(tmp_path)) == 1


@pytest.fixture(scope="module", params=[1, 3])
def undisturbed(
    request: pytest.FixtureRequest, tiny_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, dict[str, Any], Record, bytes]:
    """A batch size, and a run with it: its spec, record and answers."""
    task = {"name": "scienceqa", "data": str(questions)}
    spec = {"name": "t", "model": str(tiny_model), "task": task, "quantize": W4A4, "prune": PRUNE}
    runs = tmp_path_factory.mktemp("undisturbed")
    record = run(spec, runs, batch_size=request.param)
    return request.param, spec, record, answers(runs, record)


@pytest.mark.parametrize("cut", [0, 1, 100, 999, -1, -37])
def test_a_torn_store_is_taken_up_and_ends_with_the_same_bytes(cut: int, undisturbed: Any, tmp_path: Path) -> None:
    batch_size, spec, record, whole = undisturbed
    torn = tmp_path / "torn" / record.run_id
    torn.mkdir(parents=True)
    (torn / "answers.jsonl").write_bytes(whole[:cut])
    resumed = run(spec, tmp_path / "torn", batch_size=batch_size)
    assert answers(tmp_path / "torn", resumed) == whole
    assert resumed.scores == record.scores
    assert resumed.tokens == record.tokens
    assert resumed.timing.computed >= 1


@pytest.mark.parametrize("mode", ["letter", "generate"])
@pytest.mark.parametrize("more", [{"quantize": W4A4}, {"prune": PRUNE}])
def test_answers_do_not_depend_on_the_batch_size(mode: str, more: Any, spec_of: Spec, tmp_path: Path) -> None:
    found = []
    for size in (1, 3, 16):
        record = run(spec_of(task={"answers": mode}, **more), tmp_path / str(size), batch_size=size)
        rows = map(json.loads, answers(tmp_path / str(size), record).splitlines())
        found.append([(row["id"], row["answer"], row.get("images")) for row in rows])
    assert found[0] == found[1] == found[2]


def test_text_only_answers_do_not_depend_on_the_pruner(spec_of: Spec, tmp_path: Path) -> None:
    """The NO column is constant over pruners of one quantizer, in one sweep and alone.

    test_sweep.py compares the answers of every pruner with those of its run alone.
    """
    specs = [spec_of(quantize=W4A4)] + [
        spec_of(quantize=W4A4, prune={"method": method, "keep": (3, 9)[index % 2]})
        for index, method in enumerate(qapbench.pruners.names())
    ]
    together = qapbench.run([RunSpec.parse(spec) for spec in specs], tmp_path / "sweep")
    found = [answers(tmp_path / "sweep", record) for record in together]
    for index in (0, 1, len(specs) - 1):
        assert found[index] == answers(tmp_path / "alone", run(specs[index], tmp_path / "alone"))
    text = {tuple(line for line in lines.splitlines() if b'"images"' not in line) for lines in found}
    assert len(text) == 1
    assert {column(record, "NO").k for record in together} == {column(together[0], "NO").k}
    assert together[1].timing.computed == 7


def test_a_resumed_run_has_the_receipt_of_the_whole(spec_of: Spec, tmp_path: Path) -> None:
    """Killed after its last answer: the one batch that is made again has no image, the receipt still counts all."""
    spec = spec_of(quantize=W4A4, prune=PRUNE)
    record = run(spec, tmp_path / "whole")
    torn = tmp_path / "torn" / record.run_id
    torn.mkdir(parents=True)
    (torn / "answers.jsonl").write_bytes(answers(tmp_path / "whole", record))
    resumed = run(spec, tmp_path / "torn")
    assert resumed.timing.computed == 1
    assert resumed.receipt.summary == record.receipt.summary
    assert resumed.tokens == record.tokens


def test_a_row_added_to_a_finished_sweep_shares_its_text_answers(spec_of: Spec, tmp_path: Path) -> None:
    run(spec_of(quantize=W4A4), tmp_path, batch_size=1)
    # Another session, as another process would be.
    added = run(spec_of(quantize=W4A4, prune=PRUNE), tmp_path, batch_size=1)
    assert added.timing.computed == 7
    other = run(spec_of(prune=PRUNE), tmp_path, batch_size=1)
    assert other.timing.computed == QUESTIONS


def test_fresh_does_not_take_a_run_from_its_writer(spec_of: Spec, tmp_path: Path) -> None:
    spec = RunSpec.parse(spec_of())
    planned = Planner(tmp_path, find_device(None)).plan(spec)
    with answers_of(planned.folder).locked(), pytest.raises(UserError, match="another process is writing"):
        qapbench.run(spec, tmp_path, fresh=True)
    assert not list(tmp_path.glob("*.old*"))


def test_the_seed_of_a_run_reaches_its_pruner(spec_of: Spec, tmp_path: Path) -> None:
    specs = [spec_of(seed=seed, prune={"method": "random", "keep": 5}) for seed in (0, 1)]
    first, second = (answers(tmp_path, run(spec, tmp_path)) for spec in specs)
    assert first != second


def test_a_tower_that_appears_later_is_another_run(spec_of: Spec, tmp_path: Path, tiny_model: Path) -> None:
    """Relevance without a text tower falls back; with one it is another result, so another id."""
    import shutil

    bare = shutil.copytree(tiny_model, tmp_path / "bare", ignore=shutil.ignore_patterns("clip"))
    spec = {**spec_of(prune={"method": "cdpruner", "keep": 5}), "model": str(bare)}
    record = run(spec, tmp_path / "runs")
    assert record.notes == [f"Fallback: {record.receipt.fallbacks[0]}"]
    assert record.fingerprints["text_tower"].startswith("none")
    named = run({**spec, "text_tower": str(tiny_model / "clip")}, tmp_path / "runs")
    assert named.run_id != record.run_id
    assert named.receipt.fallbacks == []


def test_two_writers_are_refused(spec_of: Spec, tmp_path: Path) -> None:
    spec = RunSpec.parse(spec_of())
    planned = Planner(tmp_path, find_device(None)).plan(spec)
    with answers_of(planned.folder).locked(), pytest.raises(UserError, match="another process is writing"):
        qapbench.run(spec, tmp_path)


def test_the_id_follows_content_not_names(spec_of: Spec, tmp_path: Path, tiny_model: Path, questions: Path) -> None:
    import shutil

    planner = Planner(tmp_path, find_device(None))
    first = planner.plan(RunSpec.parse(spec_of()))
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model, moved)
    shutil.copy(questions, tmp_path / "copy.parquet")
    same = {**spec_of(task={"data": str(tmp_path / "copy.parquet")}), "model": str(moved)}
    assert planner.plan(RunSpec.parse(same)).id == first.id
    (moved / "generation_config.json").write_text("{}\n")
    other = shutil.copytree(moved, tmp_path / "changed")
    assert planner.plan(RunSpec.parse({**same, "model": str(other)})).id != first.id
    assert planner.plan(RunSpec.parse({**spec_of(), "seed": 1})).id != first.id


def test_a_run_that_was_not_quantized_fails_and_leaves_no_record(
    spec_of: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qapbench.strategies.ptq.rtn import RTN

    monkeypatch.setattr(RTN, "prepare", lambda *_, **__: {})
    with pytest.raises(NotQuantizedError):
        run(spec_of(quantize=W4A4), tmp_path)
    assert load_records(tmp_path) == []


def test_models_that_cannot_be_had_are_named(spec_of: Spec, tmp_path: Path) -> None:
    for name, message in [
        ("diagram-lava", "did you mean 'diagram-llava'"),
        (str(tmp_path), "no config.json"),
    ]:
        with pytest.raises(UserError, match=message):
            run({**spec_of(), "model": name}, tmp_path)


def test_an_image_placeholder_in_the_text_is_only_text(spec_of: Spec, tmp_path: Path, questions: Path) -> None:
    import pandas as pd

    frame = pd.read_parquet(questions).head(4)
    frame["question"] = "What does <image> mean? " + frame["question"]
    frame.to_parquet(tmp_path / "hostile.parquet")
    record = run(spec_of(task={"data": str(tmp_path / "hostile.parquet")}, prune=PRUNE), tmp_path)
    assert column(record, "Avg").n == 4
