"""Records of every version: read, upgraded, refused with a sentence; and the tables that are made of them.

`schema1` holds a run of version 0.1 as it was written, cut to a few answers and linears, and `schema2` one of version
0.2, cut to a few linears.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qapbench import UserError
from qapbench.files import replace_all_synced
from qapbench.receipt import ImageTokens, Receipt
from qapbench.records.answer import Answer, ScoredQuestion
from qapbench.records.intact import StoredReceipt, damage, digests, read_scored_questions
from qapbench.records.load import load_records, results
from qapbench.records.record import SCHEMA, Record, parse_record, read_record, upgraded, write_record
from qapbench.records.store import answers_of, set_aside, write_json, write_lines
from qapbench.records.tally import Tally

RUN = "13de59195cfebcbc"
OLD = Path(__file__).parent / "schema1" / RUN
LAST = Path(__file__).parent / "schema2" / "52942a178e940395"
ROOT = Path(__file__).parents[2]
Data = dict[str, Any]


def old() -> Data:
    """The stored data of the run of version 0.1."""
    data: Data = json.loads((OLD / "record.json").read_text())
    return data


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of three runs: the old one, and two of today whose answers are the same."""
    shutil.copytree(OLD, tmp_path / "runs" / RUN)
    for name, created in (("b" * 16, "2026-12-02T00:00:00+00:00"), ("a" * 16, "2026-12-01T00:00:00+00:00")):
        place = shutil.copytree(OLD, tmp_path / "runs" / name)
        record = parse_record({**old(), "run_id": name, "name": name[:3], "created": created})
        write_json(place / "record.json", record.to_json())
    return tmp_path / "runs"


def test_records_come_oldest_first_whatever_their_folders_are_called(runs: Path) -> None:
    record = read_record(runs / ("a" * 16))
    write_json(runs / ("a" * 16) / "record.json", {**record.to_json(), "created": "2026-12-03T00:00:00+00:00"})
    assert [one.run_id[0] for one in load_records(runs)] == ["1", "b", "a"]


# -- versions --


def test_a_record_of_version_0_1_is_read_as_one_of_today() -> None:
    record, data = read_record(OLD), old()
    assert data["schema"] == 1
    assert record.schema_version == SCHEMA == 3
    assert (record.run_id, record.name, record.created) == (RUN, data["name"], data["created"])
    assert record.spec == data["spec"]
    assert record.labels == {"pruner": "visionzip", "sensitivity": "combined", "fusion": "convex"}
    assert record.fingerprints == data["fingerprints"]
    assert record.notes == data["notes"]
    assert record.task is not None
    assert record.task.model_dump(exclude_none=True) == data["task"]
    for column, stored in zip(record.scores.columns, data["scores"]["columns"], strict=True):
        assert column.model_dump(exclude_none=True) == stored
        assert (column.low, column.high) == pytest.approx(Tally(column.k or 0, column.n or 0).interval)
    assert record.scores.unparsed.model_dump() == data["scores"]["unparsed"]
    assert record.tokens is not None
    assert record.tokens.model_dump(exclude_none=True) == data["tokens"]
    assert (record.tokens.kept, record.tokens.merged, record.tokens.mean) == (26, 6, 32)
    assert record.receipt.model_dump(mode="json") == {**data["receipt"], "relevance_sign": None}
    assert [line.shape for line in record.receipt.linears] == [(192, 192)] * 2
    assert record.environment.model_dump() == data["environment"]
    assert record.timing.model_dump(exclude_none=True, exclude_defaults=True) == data["timing"]
    assert record.stopped is None


def test_what_is_written_is_of_today_and_reads_back_equal(tmp_path: Path) -> None:
    record = read_record(OLD)
    stored = record.to_json()
    assert stored["schema"] == 3
    assert stored.keys() - {"files"} == old().keys()
    write_json(tmp_path / "record.json", stored)
    for place in (tmp_path, tmp_path / "record.json"):
        assert read_record(place) == record
    assert parse_record(record) is record
    assert upgraded(stored) == stored


def test_an_upgrade_changes_nothing_that_it_is_given() -> None:
    data = old()
    assert upgraded(data)["schema"] == 3
    assert data == old()


def test_version_0_1_wrote_no_tokens_as_an_empty_mapping() -> None:
    record = parse_record({**old(), "tokens": {}})
    assert record.tokens is None
    assert "tokens" not in record.to_json()
    assert parse_record(record.to_json()) == record


def test_a_record_without_what_later_versions_added_is_read() -> None:
    """Earlier ones of version 0.1 said neither text key nor labels nor task."""
    data = {key: value for key, value in old().items() if key not in ("text_key", "labels", "task", "notes")}
    record = parse_record(data)
    assert (record.text_key, record.labels, record.task, record.notes) == ("", {}, None, [])


def test_fields_that_this_version_does_not_know_are_left_out() -> None:
    record = parse_record({**old(), "mood": "good"})
    assert record == read_record(OLD)
    assert "mood" not in record.to_json()


@pytest.mark.parametrize("schema", [4, 5, 1000])
def test_a_record_of_a_newer_version_is_refused_with_a_sentence(schema: int, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    write_json(file, {**read_record(OLD).to_json(), "schema": schema})
    with pytest.raises(UserError) as caught:
        read_record(file)
    assert str(caught.value) == (
        f"{file}: schema: version {schema} was written by a newer qapbench; this one reads up to 3: upgrade qapbench"
    )


@pytest.mark.parametrize("schema", [None, 0, -1, True, "2", 2.0, [2]])
def test_what_says_no_version_is_no_record(schema: Any) -> None:
    with pytest.raises(UserError, match="schema: no version of a record"):
        parse_record({**old(), "schema": schema})


@pytest.mark.parametrize("data", [None, 3, "record", [1], [{"schema": 2}]])
def test_what_is_no_mapping_is_no_record(data: Any) -> None:
    with pytest.raises(UserError, match=f"a record is a mapping, got {type(data).__name__}"):
        parse_record(data)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r.pop("receipt"), "receipt: this field is required"),
        (lambda r: r.pop("timing"), "timing: this field is required"),
        (lambda r: r.update(spec="x"), "spec: input should be a valid dictionary"),
        (lambda r: r.update(tokens={"mean": 3}), "tokens.available: this field is required"),
        (lambda r: r["tokens"].update(mean=float("nan")), "tokens.mean: input should be a finite number"),
        (lambda r: r["scores"].pop("unparsed"), "scores.unparsed: this field is required"),
        (lambda r: r["scores"]["columns"][0].update(k=-1), "scores.columns.0.k: input should be greater than"),
        (lambda r: r["scores"]["columns"][0].update(k=212), "scores.columns.0: 212 right answers of 211 questions"),
        (lambda r: r["scores"]["columns"][0].update(name=""), "scores.columns.0.name: "),
        (lambda r: r["receipt"]["linears"][1].pop("part"), "receipt.linears.1.part: this field is required"),
        (lambda r: r.update(fingerprints={"data": 3}), "fingerprints.data: input should be a valid string"),
        (lambda r: r.update(notes="text"), "notes: input should be a valid list"),
    ],
)
def test_a_damaged_record_says_which_field_is_wrong(edit: Callable[[Data], Any], message: str, tmp_path: Path) -> None:
    data = old()
    edit(data)
    file = tmp_path / "record.json"
    file.write_text(json.dumps(data))
    with pytest.raises(UserError) as caught:
        read_record(tmp_path)
    assert str(caught.value).startswith(f"{file}: {message}")


def test_every_wrong_field_is_told_up_to_a_bound() -> None:
    data = {**old(), "name": 7, "notes": 7, "created": 7}
    with pytest.raises(UserError) as caught:
        parse_record(data)
    assert [str(problem).partition(":")[0] for problem in caught.value.problems] == ["name", "created", "notes"]
    data["scores"]["columns"] = [None] * 100
    with pytest.raises(UserError) as caught:
        parse_record(data)
    assert len(caught.value.problems) == 20


# -- a folder of runs --


def broken_records(runs: Path) -> dict[str, str]:
    """Put records that cannot be read among others: folder -> what its warning says."""
    contents: dict[str, tuple[bytes, str]] = {
        "torn": (b'{"schema": 2, "run_', "not a JSON file"),
        "empty": (b"", "not a JSON file"),
        "binary": (b"\xff\xfe\x00", "not a JSON file"),
        "deep": (b"[" * 100_000, "not a JSON file"),
        "list": (b"[1, 2]", "a record is a mapping, got list"),
        "newer": (json.dumps({**old(), "schema": 4}).encode(), "schema: version 4 was written by a newer qapbench"),
        "wrong": (json.dumps({**old(), "spec": None, "timing": 3}).encode(), "spec: input should be"),
    }
    for name, (content, _) in contents.items():
        (runs / name).mkdir()
        (runs / name / "record.json").write_bytes(content)
    (runs / "folder" / "record.json").mkdir(parents=True)
    return {name: reason for name, (_, reason) in contents.items()} | {"folder": "cannot be read"}


def test_records_are_read_oldest_first(runs: Path) -> None:
    assert [record.run_id for record in load_records(runs)] == [RUN, "a" * 16, "b" * 16]
    assert load_records(str(runs)) == load_records(runs)
    assert load_records(runs / "nowhere") == []


def test_what_was_set_aside_is_no_result(runs: Path) -> None:
    assert set_aside(runs / RUN) == runs / f"{RUN}.old1"
    assert [record.run_id for record in load_records(runs)] == ["a" * 16, "b" * 16]
    assert set_aside(runs / RUN) is None


def test_a_damaged_record_keeps_nothing_else_from_being_read(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = load_records(runs)
    by_run, by_question = results(runs), results(runs, by="question")
    expected = broken_records(runs)
    with caplog.at_level(logging.WARNING):
        assert load_records(runs) == before
    said = [entry.getMessage() for entry in caplog.records]
    assert len(said) == len(expected)
    for name, reason in expected.items():
        (line,) = (line for line in said if line.startswith(f"left out: {runs / name / 'record.json'}: "))
        assert reason in line
        assert "\n" not in line
    pd.testing.assert_frame_equal(results(runs), by_run)
    pd.testing.assert_frame_equal(results(runs, by="question"), by_question)


# -- tables --


def test_results_by_run(runs: Path) -> None:
    table = results(runs)
    scores = ["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg"]
    assert list(table.columns) == [
        *("run_id", "name", "created", "model", "task", "ptq", "weight_bits", "activation_bits"),
        *("pruner", "sensitivity", "fusion", "keep", "tokens", "seed"),
        *(f"{name}{part}" for name in scores for part in ("", " k", " n", " low", " high")),
        *("unparsed", "seconds", "receipt", "stopped", "unanswered"),
    ]
    assert list(table["run_id"]) == [RUN, "a" * 16, "b" * 16]
    row, data = table.iloc[0], old()
    assert row["model"] == "diagram-llava"
    assert row["task"] == "diagramqa"
    assert (row["ptq"], row["weight_bits"], row["activation_bits"]) == ("rtn", 4, 4)
    assert (row["pruner"], row["sensitivity"], row["fusion"]) == ("visionzip", "combined", "convex")
    assert (row["keep"], row["tokens"], row["seed"]) == (32, 32.0, 0)
    overall = data["scores"]["columns"][-1]
    assert [row[f"Avg {part}"] for part in ("k", "n", "low", "high")] == [
        overall[part] for part in ("k", "n", "low", "high")
    ]
    assert row["Avg"] == overall["accuracy"]
    assert (row["unparsed"], row["seconds"]) == (0, data["timing"]["seconds"])
    assert row["receipt"] == data["receipt"]["summary"]
    assert not row["stopped"]


def test_results_of_records_are_those_of_their_folder(runs: Path) -> None:
    records = load_records(runs)
    pd.testing.assert_frame_equal(results(records), results(runs))
    assert list(results(records[1:2])["run_id"]) == ["a" * 16]
    assert results([]).empty
    assert results(runs / "nowhere", by="question").empty


def test_results_of_other_kinds_of_runs() -> None:
    """Full precision without an image; without labels; a metric that counts nothing; a run that stopped."""
    data = old()
    spec = {**data["spec"], "quantize": None, "prune": None}
    dense = parse_record({**data, "spec": spec, "labels": {}, "tokens": None})
    bare = parse_record({**data, "labels": {}, "task": None})
    mean = {"name": "f1", "mean": 0.25, "n": 4, "stderr": 0.1}
    why = {"by": "other", "lost": 9, "won": 1, "p": 0.01, "level": 0.02, "asked": 6, "of": 14, "bound": "Stopped."}
    other = parse_record({**data, "scores": {**data["scores"], "columns": [mean]}, "stopped": why})
    table = results([dense, bare, other])
    first, second, third = (row for _, row in table.iterrows())
    for name in ("ptq", "weight_bits", "activation_bits", "pruner", "sensitivity", "fusion", "keep", "tokens"):
        assert pd.isna(first[name]), name
    assert (second["pruner"], second["sensitivity"], second["fusion"]) == ("visionzip", "combined", "convex")
    assert second["task"] == "diagramqa"
    assert (third["f1"], third["f1 n"]) == (0.25, 4)
    assert pd.isna(third["f1 k"])
    assert pd.isna(third["Avg"])
    assert list(table["stopped"]) == [False, False, True]


def test_results_by_question(runs: Path) -> None:
    table = results(runs, by="question")
    assert list(table.columns) == [
        *("run_id", "name", "task", "id", "doc", "answer", "tokens"),
        *("Avg", "G7-12", "NAT", "TXT", "unparsed", "IMG", "G1-6", "SOC"),
    ]
    assert len(table) == 3 * 5
    assert list(table["run_id"].unique()) == [RUN, "a" * 16, "b" * 16]
    mine = table[table["run_id"] == RUN].set_index("id")
    answers = {answer.id: answer for answer in answers_of(OLD).read()}
    scored = {one.id: one for one in read_scored_questions(OLD)}
    assert list(mine.index) == list(scored)
    for name, row in mine.iterrows():
        one = scored[str(name)]
        assert row["doc"] == one.doc
        assert {key: row[key] for key in one.metrics} == one.metrics
        assert all(pd.isna(row[key]) for key in {"IMG", "SOC", "G1-6"} - one.metrics.keys())
        answer = answers.get(str(name))
        assert row["answer"] == answer.answer if answer else pd.isna(row["answer"])
        assert row["tokens"] == 32 if answer and answer.images else pd.isna(row["tokens"])
    assert mine["tokens"].count() == 2
    assert mine["answer"].count() == 4


def test_tokens_of_a_question_are_those_of_all_its_images(runs: Path) -> None:
    images = [ImageTokens(available=144), ImageTokens(available=16, kept=[1, 2], merged=3)]
    answer = Answer(task="t", doc=0, id="two", answer="A", outputs=["A"], images=images)
    (runs / RUN / "answers.jsonl").unlink()
    answers_of(runs / RUN).append([answer])
    write_lines(runs / RUN / "scored.jsonl", [ScoredQuestion(id="two", doc=0, metrics={"Avg": 1.0})])
    table = results(runs, by="question")
    assert table.set_index("id").loc["two", "tokens"] == 144 + 2 + 3


def test_tables_that_cannot_be_made(runs: Path) -> None:
    with pytest.raises(UserError, match="by='row': expected 'run' or 'question'"):
        results(runs, by="row")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="name the folder of the results"):
        results(load_records(runs), by="question")


# -- what lies beside a record --


def test_answers_of_version_0_1_are_those_of_today() -> None:
    """Read, and written again with the same bytes."""
    store = answers_of(OLD)
    answers = store.read()
    assert store.count() == len(answers) == 4
    first = answers[0]
    assert (first.task, first.doc, first.id, first.answer) == ("diagramqa_letter", 351, "test-2026-image-85-2", "B")
    assert first.place == ("diagramqa_letter", 351)
    assert first.images is not None
    assert (first.images[0].available, len(first.images[0].kept or ()), first.images[0].merged) == (144, 26, 6)
    assert answers[-1].images is None
    lines = "".join(json.dumps(answer.to_json(), sort_keys=True) + "\n" for answer in answers)
    assert lines == store.path.read_text()


def test_scored_questions_of_version_0_1_are_those_of_today(tmp_path: Path) -> None:
    write_lines(tmp_path / "scored.jsonl", read_scored_questions(OLD))
    assert (tmp_path / "scored.jsonl").read_bytes() == (OLD / "scored.jsonl").read_bytes()


def test_the_receipt_of_version_0_1_is_counted_as_the_record_says() -> None:
    stored = StoredReceipt.model_validate_json((OLD / "receipt.json").read_text())
    assert stored.schema_version == 1
    assert stored.receipt.linears == read_record(OLD).receipt.linears
    stored.receipt.recount(image for answer in answers_of(OLD).read() for image in answer.images or [])
    assert stored.receipt.tokens == {**old()["tokens"], "images": 2}
    assert isinstance(stored.receipt, Receipt)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"{", "does not hold one scored question per line"),
        (b'{"id": 3, "metrics": {}}\n', "does not hold one scored question per line"),
        (b'{"id": "a", "metrics": {}, "schema": 2}\n', "does not hold one scored question per line"),
        (b"\xff\n", "does not hold one scored question per line"),
    ],
)
def test_scored_questions_that_cannot_be_read(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "scored.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_scored_questions(tmp_path)


def test_equal_lines_of_several_runs_are_kept_once(tmp_path: Path) -> None:
    alike = [ScoredQuestion(id=f"q{doc}", doc=doc, metrics={"Avg": 1.0}) for doc in range(3)]
    other = alike[0].model_copy(update={"metrics": {"Avg": 0.0}})
    for name, lines in {"a": alike, "b": [other, *alike[1:]]}.items():
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "scored.jsonl", lines)
    shared: dict[str, ScoredQuestion] = {}
    one, two = (read_scored_questions(tmp_path / name, shared) for name in "ab")
    assert (one, two) == (alike, [other, *alike[1:]])
    assert [a is b for a, b in zip(one, two, strict=True)] == [False, True, True]


LINES = [b'{"torn\n', b"[]\n", b'{"schema": 2, "task": "t"}\n', b'{"id": 3}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n"]


@pytest.mark.parametrize("line", [*LINES, b"\x00" * 512 + b"\n", b"\n"])
def test_a_line_that_is_no_answer_is_told_and_costs_no_other(line: bytes, tmp_path: Path) -> None:
    whole = (OLD / "answers.jsonl").read_bytes().splitlines(keepends=True)
    store = answers_of(tmp_path)
    store.path.write_bytes(b"".join([*whole[:2], line, *whole[2:]]))
    found = store.scan()
    assert found.lines == answers_of(OLD).read()
    assert (found.damaged, found.torn) == ([3], False)
    store.append(found.lines[:1])
    assert store.path.read_bytes().startswith(b"".join([*whole[:2], line, *whole[2:]])), "an append cuts nothing"


@pytest.fixture
def four(tmp_path: Path) -> bytes:
    """The content of a store of four answers, with checksums."""
    store = answers_of(tmp_path / "four")
    store.folder.mkdir()
    store.append(answers_of(OLD).read())
    return store.path.read_bytes()


def test_every_damaged_byte_costs_one_answer(four: bytes, tmp_path: Path) -> None:
    """Also that of a line break, and one that looks like a line break."""
    answers, store = answers_of(OLD).read(), answers_of(tmp_path)
    draw = random.Random(0)
    breaks = [place for place, byte in enumerate(four) if byte == ord("\n")]
    for place in (*range(0, len(four) - 1, 7), *breaks[:-1], *breaks[:-1]):
        byte = draw.choice([four[place] ^ (1 << draw.randrange(8)), ord("\n"), ord("\r"), 0, 0xFF])
        if byte == four[place]:
            continue
        store.path.write_bytes(four[:place] + bytes([byte]) + four[place + 1 :])
        found = store.scan()
        hit = four[:place].count(b"\n")
        assert found.damaged, place
        assert len(found.lines) >= 3, place
        assert [one for one in found.lines if one != answers[hit]] == answers[:hit] + answers[hit + 1 :], place
        assert all(one in answers for one in found.lines), "nothing damaged is taken for an answer"


def test_a_torn_end_is_cut_off_by_the_next_writer_and_is_no_damage(four: bytes, tmp_path: Path) -> None:
    answers, store = answers_of(OLD).read(), answers_of(tmp_path)
    for end in (1, 50, four.rindex(b"\n", 0, -1) + 1, len(four) - 1):
        store.path.write_bytes(four[:end])
        found = store.scan()
        assert found.lines == answers[: four[:end].count(b"\n")]
        assert found.damaged == []
        assert found.torn == (four[end - 1 : end] != b"\n")
        store.append(answers[len(found.lines) :])
        assert store.path.read_bytes() == four


def test_the_answers_to_some_questions_are_read_once_each_in_their_order(four: bytes, tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_bytes(four + four.splitlines(keepends=True)[1][:-1])
    store = answers_of(tmp_path)
    answers = store.read()
    first, _, third, _ = answers
    assert store.mentioning([third.id, first.id, third.answer, "no such text"]) == [
        answer for answer in answers if answer.id in (first.id, third.id) or answer.answer == third.answer
    ]
    assert store.mentioning([]) == []


def test_a_line_without_checksum_counts_only_as_earlier_versions_wrote_it(four: bytes, tmp_path: Path) -> None:
    store, line = answers_of(tmp_path), four.splitlines(keepends=True)[0]
    for text, count in ((line.replace(b'"check"', b'"chick"'), 0), (line[: line.rindex(b", ")] + b"}\n", 1)):
        store.path.write_bytes(text)
        assert len(store.read()) == count


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_what_cannot_be_appended_leaves_the_store_as_it_was(
    code: int, four: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, answers = answers_of(tmp_path), answers_of(OLD).read()
    store.path.write_bytes(four)

    def refuse(number: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match=r"answers\.jsonl") as caught:
            store.append(answers)
        assert caught.value.errno == code
        with pytest.raises(OSError, match=r"record\.json"):
            write_json(tmp_path / "record.json", {})
    assert store.path.read_bytes() == four
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".tmp") == []
    assert not (tmp_path / "record.json").exists()


def test_killed_writers_lose_nothing_that_was_on_disk(tmp_path: Path) -> None:
    """A sample of `python -m benchmarks.store writers`, which imports what takes seconds."""
    writers = "from benchmarks.store import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", writers, "writers", "--repeat", "2"], cwd=ROOT, capture_output=True, text=True
    )
    assert "2 of 2 trials lost nothing" in done.stdout, done.stderr


def test_several_files_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    kept = {tmp_path / "a": "new", tmp_path / "missing" / "b": "new"}
    (tmp_path / "a").write_text("old")
    abandoned = tmp_path / "a.123.tmp"
    abandoned.write_text("of a killed process")
    os.utime(abandoned, (0, 0))
    with pytest.raises(OSError, match="missing/b"):
        replace_all_synced(kept)
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_record_of_version_0_2_is_read_and_its_files_fit() -> None:
    data = json.loads((LAST / "record.json").read_text())
    record = read_record(LAST)
    assert (data["schema"], record.schema_version, record.files) == (2, 3, {})
    assert [column.model_dump(exclude_none=True) for column in record.scores.columns] == data["scores"]["columns"]
    assert (record.run_id, record.spec, record.fingerprints) == (LAST.name, data["spec"], data["fingerprints"])
    assert damage(LAST, record) == {}
    assert len(answers_of(LAST).read()) == len(read_scored_questions(LAST)) == 5


@pytest.mark.parametrize("name", ["answers.jsonl", "scored.jsonl", "receipt.json"])
@pytest.mark.parametrize("hashed", [True, False])
def test_damage_beside_a_record_is_found(name: str, hashed: bool, tmp_path: Path) -> None:
    """Of a record of today every changed byte; of earlier ones what can be seen."""
    folder = shutil.copytree(LAST, tmp_path / "run")
    record = read_record(folder)
    if hashed:
        record = record.model_copy(update={"files": digests(folder)})
    path, whole = folder / name, (folder / name).read_bytes()
    assert damage(folder, record) == {}
    contents = [
        b"",
        whole[:-40],
        whole[: len(whole) // 2],
        b"\xff" + whole[1:],
        b"[1]\n",
        b"{}\n",
        b"\0" * 99,
        b"[" * 9**5,
    ]
    for content in [*contents, *([whole.replace(b"2", b"3", 1), whole + b"\n"] if hashed else [])]:
        path.write_bytes(content)
        assert list(damage(folder, record)) == [name], content[:20]
    path.unlink()
    assert damage(folder, record) == {name: f"{name} is missing"}
    assert list(damage(folder, record, moved=True)) == ([] if name == "receipt.json" else [name])
    path.mkdir()
    assert damage(folder, record) == {name: f"{name} is no file"}


def test_a_changed_record_is_not_believed(tmp_path: Path) -> None:
    record = read_record(LAST)
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    text = (tmp_path / "record.json").read_text()
    (tmp_path / "record.json").write_text(json.dumps(json.loads(text)))
    assert read_record(tmp_path) == record, "white space does not count"
    (tmp_path / "record.json").write_text(text.replace('"k": 5', '"k": 4', 1))
    with pytest.raises(UserError, match=r"record\.json: damaged"):
        read_record(tmp_path)


def test_answers_are_arranged_by_place(tmp_path: Path) -> None:
    answers = answers_of(OLD).read()
    store = answers_of(tmp_path)
    store.append([answers[3], answers[0], answers[3].model_copy(update={"answer": "later"}), answers[1]])
    places = [answer.place for answer in answers]
    assert store.arrange(lambda answer: answer.place, places[:2] + places[3:]) == [*answers[:2], answers[3]]
    assert store.arrange(lambda answer: answer.place, places[1:2]) == [answers[1]]
    assert store.read() == [answers[1]]


def test_a_stopped_record_says_so_in_its_name() -> None:
    why = {"by": "other", "lost": 9, "won": 1, "p": 0.01, "level": 0.02, "asked": 6, "of": 14, "bound": "Stopped."}
    record: Record = parse_record({**old(), "stopped": why})
    assert record.named("mine").name == "mine (stopped: 6 of 14)"
    assert read_record(OLD).named("mine").name == "mine"


def test_one_run_without_scores_keeps_no_other_from_the_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And a record is not believed about where its answers lie: its own folder counts."""
    source = next((Path(__file__).parent / "schema1").iterdir())
    for name in ("whole", "torn"):
        shutil.copytree(source, tmp_path / name)
    (tmp_path / "torn" / "scored.jsonl").write_text("{")
    with caplog.at_level(logging.WARNING):
        table = results(tmp_path, by="question")
    assert len(table) == len((source / "scored.jsonl").read_text().splitlines())
    assert "torn" in caplog.text
