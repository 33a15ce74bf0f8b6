"""Rows, files and the paper's numbers, without a browser."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from leaderboard_records import ablation, hostile
from scipy.stats import binomtest

from qapbench import UserError
from qapbench.leaderboard import build
from qapbench.leaderboard.paper import as_count, paper_rows, reference
from qapbench.leaderboard.rows import column_names, counted, from_record, quantization_label


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


def test_counts_win_over_a_rate_that_disagrees() -> None:
    record = {"scores": {"columns": [{"name": "Avg", "k": 1, "n": 4, "accuracy": 0.9}]}}
    assert from_record(record).cells["Avg"].accuracy == 0.25


def test_columns_are_merged_in_their_own_order() -> None:
    def row(*names: str) -> dict[str, object]:
        return {"scores": {"columns": [{"name": name, "k": 1, "n": 2} for name in names]}}

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


def test_inlined_json_cannot_end_its_script(tmp_path: Path) -> None:
    page = build(hostile(), tmp_path / "page.html").read_text("utf-8")
    inlined = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    assert not set(inlined) & set("<>&\u2028\u2029")
    assert json.loads(inlined)["rows"][0]["model"] == "<img src=x onerror=alert(1)>"


def test_csv_holds_no_formula(tmp_path: Path) -> None:
    path = build(hostile(), tmp_path / "page.html").with_suffix(".csv")
    with path.open(encoding="utf-8", newline="") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert "'=1+1" in cells
    suspects = [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    assert all(float(cell) <= 0 for cell in suspects)  # a difference, and nothing else


def test_the_page_must_be_named_html(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"should end in \.html"):
        build([], tmp_path / "page.csv")
