"""Ranks, references, flags, flips and studies of a page, without a browser; and the check of a record."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from leaderboard_records import SCRIPT_END, ablation
from leaderboard_runs import KEEP, QUESTIONS, TOKENS, write_questions, write_runs, write_several, write_study

from qapbench import UserError
from qapbench.analysis.check import check_record
from qapbench.analysis.paired import compare, read_scored
from qapbench.leaderboard import build
from qapbench.leaderboard.flips import find_flips
from qapbench.leaderboard.paper import paper_rows
from qapbench.leaderboard.ranking import compared, scored_runs
from qapbench.leaderboard.rows import from_record
from qapbench.records.load import load_records
from qapbench.visible import visible

RESULTS = Path(__file__).parents[2] / "leaderboard" / "results"
Data = dict[str, Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_runs(folder, write_questions(tmp_path_factory.mktemp("data") / "test.parquet"))
    write_study(folder)
    return folder


def rows_of(runs: Path, out: Path) -> tuple[list[Data], Data]:
    """The page's rows and what its script reads."""
    page = build(load_records(runs), out / "page.html", runs=runs)
    inlined = page.read_text("utf-8").split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return json.loads(page.with_suffix(".json").read_text("utf-8")), json.loads(inlined)


def test_references_are_paired_with_the_stored_scores(runs: Path, tmp_path: Path) -> None:
    rows, _ = rows_of(runs, tmp_path)
    places = {row["name"]: place for place, row in enumerate(rows) if row["kind"] == "run"}
    assert {name: set(rows[place]["against"]) for name, place in places.items()} == {
        "full": set(),
        "dense": set(),
        "semantic": {"dense"},
        "combined": {"dense", "semantic"},
        "l2": {"dense", "semantic"},
    }
    folders = {record.name: runs / record.run_id for record in load_records(runs)}
    qs = []
    for name, kind, other in (("l2", "semantic", "semantic"), ("combined", "dense", "dense")):
        against = rows[places[name]]["against"][kind]
        assert (against["row"], against["name"]) == (places[other], other)
        overall = compare(read_scored(folders[other]), read_scored(folders[name])).differences[-1]
        for field in ("difference", "low", "high", "p", "gained", "lost"):
            assert against[field] == getattr(overall, field)
        qs.append(against["q"] >= against["p"])
    assert all(qs)
    assert all(rows[place]["rank"] >= 1 and rows[place]["among"] == 5 for place in places.values())


def test_csv_has_the_comparisons(runs: Path, tmp_path: Path) -> None:
    rows, _ = rows_of(runs, tmp_path)
    with (tmp_path / "page.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    (line,), (row,) = ([r for r in kind if r["name"] == "l2"] for kind in (lines, rows))
    against = row["against"]["semantic"]
    assert line["semantic name"] == "semantic"
    assert line["semantic difference"] == f"{100 * against['difference']:.2f}"
    assert (line["semantic gained"], line["rank"]) == (str(against["gained"]), str(row["rank"]))


def test_records_alone_have_no_comparison(tmp_path: Path) -> None:
    build(ablation(4), tmp_path / "page.html", runs=tmp_path)
    rows = json.loads((tmp_path / "page.json").read_text("utf-8"))
    assert all(row["rank"] is None and not row["against"] for row in rows if row["kind"] == "run")


def test_a_record_cannot_name_another_folder(runs: Path, tmp_path: Path) -> None:
    records = [record.model_copy(update={"run_id": f"x/../{record.run_id}"}) for record in load_records(runs)]
    build(records, tmp_path / "page.html", runs=runs)
    rows = json.loads((tmp_path / "page.json").read_text("utf-8"))
    assert all(row["rank"] is None for row in rows if row["kind"] == "run")


def test_pruning_that_moves_questions_without_context_is_flagged(runs: Path, tmp_path: Path) -> None:
    rows, _ = rows_of(runs, tmp_path)
    assert not any(row["moved"] for row in rows)
    write_runs(tmp_path / "moved", write_questions(tmp_path / "t.parquet"), moved=True)
    rows, _ = rows_of(tmp_path / "moved", tmp_path)
    flagged = {row["name"]: row["moved"] for row in rows if row["moved"]}
    assert set(flagged) == {"semantic", "combined", "l2"}
    assert "questions without context differ from dense" in flagged["l2"]
    assert "changed what pruning cannot change" in (tmp_path / "page.html").read_text("utf-8")


def test_the_papers_rows_are_compared_unpaired() -> None:
    rows = {(r.model, r.name, r.run_id[-1]): r for r in paper_rows(100)}
    combined = rows["LLaVA-7B", "combined", "2"]
    against = combined.against["semantic"]
    assert against.name == "none (semantic only)"
    assert against.difference == pytest.approx((3429 - 3334) / 4241)
    assert against.gained is None
    assert against.low > 0
    assert combined.against["dense"].name == "Q-VLM"
    fused = rows["LLaVA-1.5-7B", "QAPruner 32", "1"].against
    assert {kind: one.name for kind, one in fused.items()} == {"dense": "W4A4", "semantic": "CDPruner 32"}
    assert not any(row.moved for row in rows.values())
    table = [row for key, row in rows.items() if key[2] == "2" and row.sensitivity not in ("none", "norm (a)")]
    assert len({row.rank for row in table}) == 1  # nothing separates these metrics without the answers


def test_flips_carry_the_question_its_image_and_both_choices(runs: Path, tmp_path: Path) -> None:
    rows, data = rows_of(runs, tmp_path)
    assert data["flips"]["missing"] == ["the image processor of tiny: images are drawn as their centre square"]
    place = next(i for i, row in enumerate(rows) if row["name"] == "l2")
    (flips,) = data["flips"]["rows"][str(place)]
    assert (flips["against"], flips["task"], flips["counts_right"]) == ("semantic", "", True)
    for direction, right in (("gained", 1), ("lost", 0)):
        assert flips[direction]["count"] == rows[place]["against"]["semantic"][direction]
        assert flips[direction]["shown"]
        for flip in flips[direction]["shown"]:
            question = data["flips"]["questions"][flip["question"]]
            assert question["image"].startswith("data:image/")
            assert flip["sides"][right]["answer"] == question["truth"] != flip["sides"][1 - right]["answer"]
            assert [side["score"] for side in flip["sides"]] == [1 - right, right]
            assert all(len(side["kept"]) == KEEP and side["grid"] == [4, 4] for side in flip["sides"])
    (dense,) = data["flips"]["rows"][str(next(i for i, row in enumerate(rows) if row["name"] == "semantic"))]
    assert dense["lost"]["shown"][0]["sides"][0]["kept"] is None


def test_flips_of_several_tasks_are_those_of_each(tmp_path: Path) -> None:
    write_several(tmp_path / "runs", ("dense", "semantic", "l2"))
    rows, data = rows_of(tmp_path / "runs", tmp_path)
    place = next(i for i, row in enumerate(rows) if row["name"] == "l2")
    flips = data["flips"]["rows"][str(place)]
    assert [one["task"] for one in flips] == ["scienceqa", "scienceqa (2)"]
    texts = []
    for one in flips:
        assert one["against"] == "semantic"
        for direction in ("gained", "lost"):
            assert one[direction]["count"] == rows[place]["by_task"][one["task"]]["against"]["semantic"][direction] > 0
            texts += [data["flips"]["questions"][flip["question"]]["text"] for flip in one[direction]["shown"]]
            assert all(len(side["kept"]) == KEEP for flip in one[direction]["shown"] for side in flip["sides"])
    assert len({text.startswith("What is number") for text in texts}) == 2, "each task shows its own questions"


def test_scores_between_0_and_1_are_shown_as_numbers(runs: Path) -> None:
    counted = [run for run in scored_runs(load_records(runs), runs, []) if run]
    rows = compared([from_record(run.record) for run in counted], counted)
    halved = []
    for run in counted:
        columns = [one.model_copy(update={"k": None, "mean": 0.4}) for one in run.record.scores.columns]
        table = run.record.scores.model_copy(update={"columns": columns})
        halves = {question: {name: score / 2 for name, score in row.items()} for question, row in run.rows.items()}
        halved.append(replace(run, record=run.record.model_copy(update={"scores": table}), rows=halves))
    flips = [one for several in find_flips(rows, halved).rows.values() for one in several]
    assert flips
    assert not any(one["counts_right"] for one in flips)
    sides = [side for one in flips for flip in one["gained"]["shown"] for side in flip["sides"]]
    assert {side["score"] for side in sides} == {0.0, 0.5}


def test_missing_data_are_said_to_be_missing(tmp_path: Path) -> None:
    data = write_questions(tmp_path / "test.parquet")
    write_runs(tmp_path / "runs", data)
    data.unlink()
    _, page = rows_of(tmp_path / "runs", tmp_path)
    assert page["flips"]["missing"] == ["questions of scienceqa: they are not on this machine"]
    assert not page["flips"]["questions"]
    assert all(flips["gained"]["shown"] == [] for (flips,) in page["flips"]["rows"].values())


def test_studies_are_on_the_page_and_foreign_ones_are_not(runs: Path, tmp_path: Path) -> None:
    _, data = rows_of(runs, tmp_path)
    assert [study["name"] for study in data["studies"]] == ["tiny rtn W4A4"]
    shutil.copytree(runs, tmp_path / "more")
    (tmp_path / "more" / "study-b").mkdir()
    (tmp_path / "more" / "study-b" / "study.json").write_text('{"study": "of something else"}')
    _, data = rows_of(tmp_path / "more", tmp_path)
    assert len(data["studies"]) == 1


def test_hostile_questions_and_studies_are_data(tmp_path: Path) -> None:
    write_runs(tmp_path / "runs", write_questions(tmp_path / "t.parquet", hostile=True))
    write_study(tmp_path / "runs", hostile=True)
    _, data = rows_of(tmp_path / "runs", tmp_path)
    assert data["studies"][0]["model"].startswith(visible(SCRIPT_END))
    assert next(iter(data["flips"]["questions"].values()))["text"] == visible(SCRIPT_END)


# -- records by pull request --


@pytest.fixture
def one(runs: Path, tmp_path: Path) -> Path:
    """A copy of the pruned run, to be tampered with."""
    (record,) = (record for record in load_records(runs) if record.name == "combined")
    return shutil.copytree(runs / record.run_id, tmp_path / record.run_id)


def test_an_honest_record_passes(one: Path) -> None:
    for path in (one, one / "record.json"):
        report = check_record(path)
        assert any(f"{QUESTIONS} stored answers" in line for line in report.passed)
        assert len(report.notes) == 1


def change(name: str, edit: Callable[[Any], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        text = (folder / name).read_text()
        data = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
        for line in data if isinstance(data, list) else ():
            line.pop("check", None)
        edit(data)
        lines = [data] if name.endswith(".json") else data
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    return apply


def overall(record: Data) -> Data:
    return record["scores"]["columns"][-1]


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (change("record.json", lambda r: overall(r).update(k=overall(r)["k"] + 1)), "Avg says"),
        (change("record.json", lambda r: overall(r).update(accuracy=0.99)), "Avg.accuracy does not follow"),
        (change("record.json", lambda r: r["scores"]["columns"].pop(0)), "column NAT is missing"),
        (change("record.json", lambda r: r["scores"]["unparsed"].update(k=3)), "unparsed says 3"),
        (change("record.json", lambda r: r.pop("receipt")), "record.json: receipt: this field"),
        (change("record.json", lambda r: r.update(schema=4)), "schema: version 4 was written by a newer qapbench"),
        (change("record.json", lambda r: r.update(run_id="../x")), "expected 16 hexadecimal digits, got '../x'"),
        (change("record.json", lambda r: r["receipt"].update(linears=[])), "names no linear"),
        (change("record.json", lambda r: r["receipt"]["linears"][0].update(weight_bits=32)), "did not reach 4 bits"),
        (change("record.json", lambda r: r["receipt"]["linears"][0].update(activation_bits=None)), "activations of"),
        (change("record.json", lambda r: r["tokens"].update(mean=2)), "tokens are not those"),
        (change("record.json", lambda r: r["spec"]["prune"].update(keep=9)), "run_id does not follow"),
        (change("record.json", lambda r: r.update(labels={"pruner": "better"})), "labels are not"),
        (change("record.json", lambda r: r["spec"].update(plugins=["x.py"])), "plugin"),
        (change("record.json", lambda r: r["spec"]["task"].update(name="hellaswag")), "can be verified"),
        (change("record.json", lambda r: r["spec"]["task"].update({"from": "lmms-eval"})), "can be verified"),
        (change("record.json", lambda r: r["spec"]["task"].update(include_path="tasks")), "can be verified"),
        (change("record.json", lambda r: r["spec"]["task"].update(data="/none.parquet")), "--data"),
        (change("record.json", lambda r: r["fingerprints"].update(data="0" * 64)), "data"),
        (change("answers.jsonl", lambda a: a.pop()), f"each of the {QUESTIONS} questions"),
        (change("answers.jsonl", lambda a: a[0].update(id="zz")), "another id"),
        (change("answers.jsonl", lambda a: a[0].update(outputs=[3])), "answers.jsonl is damaged in line 1"),
        (change("answers.jsonl", lambda a: a[0]["images"][0].update(kept=[1])), "tokens are not those"),
        (change("scored.jsonl", lambda s: s[0]["metrics"].update(Avg=1 - s[0]["metrics"]["Avg"])), "scored.jsonl does"),
        (lambda folder: (folder / "answers.jsonl").unlink(), "missing or empty"),
        (lambda folder: (folder / "scored.jsonl").unlink(), "scored.jsonl is missing"),
        (lambda folder: (folder / "record.json").write_text("{"), "not a JSON file"),
        (lambda folder: (folder / "record.json").unlink(), "cannot be read"),
    ],
)
def test_a_tampered_record_is_refused(tamper: Callable[[Path], None], message: str, one: Path) -> None:
    tamper(one)
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        check_record(one)


def test_a_folder_of_another_name_is_refused(one: Path) -> None:
    with pytest.raises(UserError, match="named by the run's id"):
        check_record(one.rename(one.with_name("mine")))


def test_every_record_of_the_project_passes() -> None:
    assert (RESULTS / "README.md").is_file()
    for path in RESULTS.glob("*/record.json"):
        assert check_record(path).passed
    assert TOKENS > KEEP
