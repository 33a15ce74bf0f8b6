"""What rows cost on the page: columns, the Pareto plot over any of them, and rows at equal cost."""

import csv
import io
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from leaderboard_records import ablation, record

from benchmarks import pareto
from qapbench.leaderboard import build
from qapbench.leaderboard.costs import COSTS, costs_of, with_equal_costs
from qapbench.leaderboard.rows import Row
from qapbench.records.record import parse_record

RECORDS = ablation(12)
TRACES = "gd => gd.data.map(t => ({name: t.name, x: t.x, opacity: t.marker?.opacity, at: t.customdata, meta: t.meta}))"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(RECORDS, tmp_path_factory.mktemp("costs") / "board.html")


def test_csv_and_json_have_the_costs_of_the_records(page: Path) -> None:
    rows = json.loads(page.with_suffix(".json").read_text("utf-8"))
    table = list(csv.DictReader(io.StringIO(page.with_suffix(".csv").read_text("utf-8"))))
    for data, row, line in zip(RECORDS, rows, table, strict=False):
        costs = costs_of(parse_record(data))
        assert [*costs, "ms"] == list(COSTS), "nothing was measured"
        assert row["costs"] == costs
        assert costs["tflops"] == pytest.approx(
            (1.1e8 + 1e6 * (costs["layer_mean"] < 144) + 6e6 * costs["layer_mean"]) / 1e12
        )
        assert {name: float(line[column.head]) for name, column in COSTS.items() if name in costs} == costs
    paper = [(row, line) for row, line in zip(rows, table, strict=True) if row["kind"] == "paper"]
    assert all(row["costs"] == {} and line["TFLOPs"] == "" for row, line in paper)


def test_a_record_of_an_earlier_version_costs_what_its_tokens_say(tmp_path: Path) -> None:
    old = [{key: value for key, value in one.items() if key != "cost"} for one in RECORDS[:3]]
    assert costs_of(parse_record(old[1])) == {"layer_mean": 64.0, "tokens_share": 100 * 64 / 144}
    inside = {**old[1], "tokens": {**old[1]["tokens"], "layer_mean": 80.5}}
    assert costs_of(parse_record(inside))["layer_mean"] == 80.5
    text = {**old[1], "tokens": None}
    assert costs_of(parse_record(text)) == {}
    built = build([*old, text], tmp_path / "old.html")
    assert '"cost tokens_share"' in built.read_text("utf-8")
    assert '"cost tflops"' not in built.read_text("utf-8"), "no row has it"


def test_rows_share_a_cost_within_two_percent() -> None:
    means = [64.0, 65.0, 66.5, 100.0, 101.9, 200.0]
    rows = with_equal_costs([*(Row(costs={"layer_mean": mean}) for mean in means), Row()])
    assert [row.equal_cost for row in rows] == ["64.5 per layer"] * 2 + ["", "101 per layer", "101 per layer", "", ""]


def test_the_plot_over_any_cost(show: Callable[..., Any], page: Path) -> None:
    shown = show(page)
    assert shown.locator("#table thead th[data-key='cost tflops']").is_visible()
    for name in ("tokens", "tflops", "tbops", "weight_gb"):
        shown.locator("#axis").select_option(name)
        shown.settled()
        traces = shown.locator("#chart").evaluate(TRACES)
        own = json.loads(page.with_suffix(".json").read_text("utf-8"))[: len(RECORDS)]
        place = [row["tokens"] if name == "tokens" else row["costs"][name] for row in own]
        score = [row["cells"]["Avg"]["accuracy"] for row in own]
        beaten = {
            i for i in range(len(own)) if any(place[j] <= place[i] and score[j] > score[i] for j in range(len(own)))
        }
        frontier = next(trace for trace in traces if trace["name"] == "Pareto frontier")
        assert set(frontier["meta"]) & beaten == set()
        faded = {
            at
            for trace in traces
            for at, opacity in zip(trace["at"] or (), trace["opacity"] or (), strict=False)
            if isinstance(opacity, float) and opacity < 1
        }
        assert beaten <= faded
        assert not faded & set(frontier["meta"])
    shown.locator('#table tr[data-row="1"] .open').click()
    assert "Tokens x layers, %" in shown.locator("dialog[open]").inner_text()


def test_rows_at_equal_cost_are_a_filter(show: Callable[..., Any], tmp_path: Path) -> None:
    inside = record(50, {"method": "fastv", "keep": 20, "sensitivity": None, "fusion": None, "positions": "keep"})
    inside["tokens"] |= {"layer_mean": 64.3}
    path = build([*RECORDS, inside], tmp_path / "equal.html")
    shown = show(path)
    shown.locator("select[data-facet=equal_cost]").select_option(label="64.05 per layer")
    shown.settled()
    names = shown.locator("#table tbody .open").all_text_contents()
    assert inside["name"] in names
    assert len(names) == 1 + sum(one["tokens"]["mean"] == 64 for one in RECORDS)


def test_on_a_phone(show: Callable[..., Any], page: Path) -> None:
    shown = show(page, width=390, height=800, touch=True)
    shown.locator("#axis").select_option("tbops")
    shown.settled()
    assert shown.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    assert not shown.locator("#table thead th[data-key='cost tflops']").is_visible()
    shown.locator("button[data-columns=Cost]").click()
    assert shown.locator("#table thead th[data-key='cost tflops']").is_visible()


def test_a_picture_of_accuracy_over_cost(tmp_path: Path) -> None:
    """Names do not cover one another, and what another row dominates is faded."""
    records = [parse_record(one) for one in RECORDS]
    points = pareto.points_of(records, tmp_path, "tflops")
    assert [point.cost for point in points] == [costs_of(one)["tflops"] for one in records]
    assert pareto.points_of(records, tmp_path, "ms") == []
    best = pareto.frontier(points)
    assert [point.accuracy for point in best] == sorted(point.accuracy for point in best)
    for point in points:
        beaten = [other for other in points if other.cost <= point.cost and other.accuracy > point.accuracy]
        assert not (beaten and point in best)
    drawn = ElementTree.fromstring(pareto.picture("<rows>", "TFLOPs", points))
    names = {f"{point.name} ({100 * point.accuracy:.1f})": point for point in points}
    places = []
    for group in drawn.findall("{*}g"):
        text = group.find("{*}text")
        assert text is not None and text.text
        assert (float(group.get("opacity", "")) == 1) == (names[text.text] in best)
        places.append(float(text.get("y", "")))
    assert len(places) == len(points)
    gaps = [after - before for before, after in itertools.pairwise(sorted(places))]
    assert min(gaps) >= pareto.STEP - 0.2


def test_names_are_moved_no_further_than_they_must() -> None:
    assert pareto.spread([10, 100, 101, 300], 16) == [10, 92.5, 108.5, 300]
    assert pareto.spread([], 16) == []
