"""Rows, files and the paper's numbers, without a browser."""

from __future__ import annotations

import copy
import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from leaderboard_records import ablation, damaged, hostile, record
from scipy.stats import binomtest

from qapbench import UserError
from qapbench.checkpoints.find import EMBEDDED
from qapbench.leaderboard import build
from qapbench.leaderboard.builder import valid_records
from qapbench.leaderboard.export import csv_text
from qapbench.leaderboard.paper import as_count, paper_rows, reference
from qapbench.leaderboard.rows import column_names, counted, from_record, quantization_label
from qapbench.leaderboard.tasks import task_labels
from qapbench.records.record import Record, parse_record


def test_every_printed_percentage_is_an_integer_of_its_questions() -> None:
    tables = reference()["tables"]
    printed = [
        (value, reference()["questions"][name])
        for table in tables
        for line in table["rows"]
        for name, value in zip(table["columns"], line["printed"], strict=True)
    ]
    assert len(printed) == 18 * 7 + 10 * 3
    for value, n in printed:
        k = as_count(value, n)
        assert k is not None
        assert f"{100 * k / n:.2f}" == f"{value:.2f}"


def test_a_percentage_that_no_integer_gives_has_no_count() -> None:
    assert as_count(50.01, 10) is None


def test_the_papers_counts_add_up() -> None:
    """Subjects, and grades, part the questions: their counts sum to the total in every row."""
    for row in paper_rows():
        k = {name: cell.k for name, cell in row.cells.items()}
        parts = ("NAT", "SOC", "LAN") if k["NAT"] is not None else ("G1-6", "G7-12")
        assert sum(k[name] or 0 for name in parts) == k["Avg"], row.name


def test_pruning_leaves_questions_without_image_alone_in_the_paper() -> None:
    for model in ("LLaVA-7B", "LLaVA-13B", "LLaVA-1.5-7B"):
        rows = [r for r in paper_rows() if r.model == model and r.quantization == "W4A4"]
        assert len({r.cells["NO"].k for r in rows if r.cells["NO"].k is not None}) == 1


@pytest.mark.parametrize(("k", "n"), [(0, 7), (7, 7), (1, 2), (3429, 4241)])
def test_wilson_agrees_with_scipy(k: int, n: int) -> None:
    expected = binomtest(k, n).proportion_ci(method="wilson")
    cell = counted(k, n)
    assert (cell.low, cell.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def scored(*columns: dict[str, object]) -> Record:
    """A record with those columns of scores."""
    return parse_record({**record(0, None), "scores": {"columns": list(columns), "unparsed": {"k": 0, "n": 4}}})


def test_counts_win_over_a_rate_that_disagrees() -> None:
    row = from_record(scored({"name": "Avg", "k": 1, "n": 4, "accuracy": 0.9}))
    assert row.cells["Avg"].accuracy == 0.25


def test_columns_are_merged_in_their_own_order() -> None:
    def row(*names: str) -> Record:
        return scored(*({"name": name, "k": 1, "n": 2} for name in names))

    records = [row("NAT", "Avg"), row("NAT", "SOC", "Avg"), row("G1-6", "Avg")]
    assert column_names(map(from_record, records)) == ["G1-6", "NAT", "SOC", "Avg"]


def test_quantization_labels() -> None:
    four = {"bits": 4, "group_size": 128}
    assert quantization_label(None) == "none"
    assert quantization_label(None, "bfloat16") == "none (bfloat16)"
    both = {"method": "rtn", "weights": four, "activations": four, "scope": ["language"]}
    assert quantization_label(both) == "rtn W4A4 g128"
    weights = {"method": "rtn", "weights": four, "scope": ["language", "vision"]}
    assert quantization_label(weights) == "rtn W4A16 g128 on language+vision"


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (build(ablation(3), tmp_path / name / "page.html") for name in ("a", "b"))
    for kind in (".html", ".csv", ".json"):
        assert first.with_suffix(kind).read_bytes() == second.with_suffix(kind).read_bytes()


def test_typed_and_plain_records_give_the_same_page(tmp_path: Path) -> None:
    records = ablation(3)
    first = build(records, tmp_path / "a" / "page.html")
    second = build([parse_record(one) for one in records], tmp_path / "b" / "page.html")
    assert first.read_bytes() == second.read_bytes()
    older = [{**one, "schema": 1} for one in records]  # of version 0.1, which is read as well
    assert build(older, tmp_path / "c" / "page.html").read_bytes() == first.read_bytes()


def test_what_is_no_record_is_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each damaged one is named in a warning with what is wrong, and the others are on the page, safely."""
    mixed = [one for pair in zip(damaged().values(), [*hostile(), *ablation(4)], strict=True) for one in pair]
    with caplog.at_level(logging.WARNING):
        page = build(mixed, tmp_path / "page.html")
    said = [entry.getMessage() for entry in caplog.records if entry.name == "qapbench.leaderboard.builder"]
    assert [line.partition(" is left out: ")[0] for line in said] == [f"record {name}" for name in damaged()]
    assert all(line.partition(" is left out: ")[2] for line in said)
    reasons = ["schema: no version", "run_id: this field is required", "schema: no version", "timing.seconds: "]
    reasons += ["9 right answers of 3", "written by a newer qapbench", "scores.columns.0: "]
    for line, reason in zip(said, reasons, strict=True):
        assert reason in line
    rows = [row for row in json.loads(page.with_suffix(".json").read_text("utf-8")) if row["kind"] == "run"]
    names = [str(one["name"]).encode("utf-8", "replace").decode() for one in [*hostile(), *ablation(4)]]
    assert [row["name"] for row in rows] == names
    attack, _, odd = rows[:3]
    assert attack["model"] == "<img src=x onerror=alert(1)>"
    assert odd["name"] == "lone ? surrogate"
    assert odd["quantization"] == "4"
    assert [odd["cells"][name]["accuracy"] for name in ("Avg", "NAT", "NO")] == [None] * 3
    text = page.read_text("utf-8")
    assert "<img src=x" not in text
    assert "</script><script>alert(2)" not in text


def test_hostile_records_are_valid_and_damaged_ones_are_not(caplog: pytest.LogCaptureFixture) -> None:
    assert len(valid_records(hostile())) == len(hostile())
    assert not caplog.records
    assert valid_records(list(damaged().values())) == []


def test_inlined_json_cannot_end_its_script(tmp_path: Path) -> None:
    page = build([*hostile(), *damaged().values()], tmp_path / "page.html").read_text("utf-8")
    inlined = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    assert not set(inlined) & set("<>&\u2028\u2029")
    assert json.loads(inlined)["rows"][0]["model"] == "<img src=x onerror=alert(1)>"


def test_csv_holds_no_formula(tmp_path: Path) -> None:
    path = build([*hostile(), *damaged().values()], tmp_path / "page.html").with_suffix(".csv")
    with path.open(encoding="utf-8", newline="") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert "'=1+1" in cells
    suspects = [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    assert all(float(cell) <= 0 for cell in suspects)  # a difference, and nothing else


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20"])
def test_no_text_of_a_record_starts_a_formula(start: str) -> None:
    row = from_record(parse_record({**record(0, None), "name": f"{start}cmd()"}))
    line = next(csv.DictReader(csv_text([row], []).splitlines(keepends=True)))
    assert line["name"] == f"'{start}cmd()"


def test_no_number_of_a_record_keeps_the_page_from_being_built(tmp_path: Path) -> None:
    """Such a record is left out, or its cell is empty; the rows of the others are as ever."""
    good, bad = ablation(3)[1:]
    wanted = build([good], tmp_path / "good.html").with_suffix(".json").read_text(encoding="utf-8")
    places = [("cost", "weight_bytes"), ("cost", "flops_share"), ("tokens", "available"), ("scores", "unparsed", "n")]
    places += [("timing", "seconds"), ("notes", 0), ("spec", "seed"), ("spec", "prune", "keep")]
    records = [good]
    for place in places:
        for value in (10**400, -(10**400), 1e308, -1e308, -1, 0, 5e-324):
            broken = copy.deepcopy(bad)
            at: Any = broken
            for name in place[:-1]:
                at = at[name]
            if isinstance(at, list):
                at[:] = [value]
            else:
                at[place[-1]] = value
            records.append(broken)
    path = build(records, tmp_path / "page.html")
    rows = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert {**rows[0], "equal_cost": ""} == {**json.loads(wanted)[0], "equal_cost": ""}
    assert len(rows) > len(places)


def test_the_page_must_be_named_html(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"should end in \.html"):
        build([], tmp_path / "page.csv")


def test_a_task_with_a_score_of_its_own_has_its_own_columns() -> None:
    """The page of such a task alone has its score, not the empty columns of the paper's rows."""
    like_the_paper = parse_record({**record(0, None), "task": {"name": "diagramqa", "questions": 4, "score": "Avg"}})
    own = parse_record({**record(1, None), "task": {"name": "my_colors", "questions": 4, "score": "acc"}})
    assert task_labels([like_the_paper]) == []
    assert task_labels([own]) == ["my_colors"]
    assert task_labels([like_the_paper, own]) == ["diagramqa", "my_colors"]


def test_rows_of_a_constructed_model_are_marked(tmp_path: Path) -> None:
    """What the notes of a run of `diagram-llava-outliers` say, as a record holds it, and on the page."""
    status = (EMBEDDED / "diagram-llava-outliers" / "status.txt").read_text(encoding="utf-8").strip()
    plain, made = record(0, None), record(1, None, model="diagram-llava-outliers:strength=12")
    made["notes"] = [f"Stand-in model: {status}"]
    rows = [from_record(parse_record(one)) for one in (plain, made)]
    assert [row.constructed for row in rows] == [False, True]
    assert all(row.stand_in for row in rows)
    page = build([plain, made], tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count(">constructed</span>") == 1
    assert status in page
