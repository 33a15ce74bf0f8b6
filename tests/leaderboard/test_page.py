"""The page as a reader meets it: in a browser, offline, with friendly and with hostile records.

Opening 200 rows takes well under a second; nothing here asserts a time, which would measure the machine.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from leaderboard_records import IMG, SCRIPT_END, ablation, hostile

from qapbench.leaderboard import build

RECORDS = ablation(12)
HOSTILE = ablation(6) + hostile()
PAPER_ROWS = 28
Show = Callable[..., Any]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    sets = {"plain": RECORDS, "hostile": HOSTILE, "long": ablation(200), "empty": []}
    return {name: build(records, folder / f"{name}.html") for name, records in sets.items()}


def column(page: Any, head: str) -> int:
    heads = page.locator("#table thead th").all_text_contents()
    return next(i for i, text in enumerate(heads) if text.strip() == head) + 1


def values(page: Any, head: str) -> list[float]:
    cells = page.locator(f"#table tbody td:nth-child({column(page, head)})")
    return [float(value) for value in cells.evaluate_all("cells => cells.map(cell => cell.dataset.order)")]


def sort(page: Any, head: str, direction: str) -> None:
    """Click a head, and wait until the table is in that order."""
    cell = page.locator(f"#table thead th:nth-child({column(page, head)})")
    cell.click()
    page.locator(f"#table thead th.dt-ordering-{direction}:has-text('{head}')").wait_for()


def visible_rows(page: Any) -> int:
    return page.locator("#table tbody tr[data-row]").count()


def open_row(page: Any, index: int) -> Any:
    """Open the details of the record with that index, and return the dialog."""
    page.locator(f'#table tr[data-row="{index}"] .open').click()
    return page.locator("dialog[open]")


def fits_sideways(page: Any) -> bool:
    return page.evaluate(
        "() => document.documentElement.scrollWidth <= innerWidth && document.body.scrollWidth <= innerWidth"
    )


def test_sorts_by_any_column(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["plain"])
    average = values(page, "Avg")
    assert average == sorted(average, reverse=True)
    for head in ("NAT", "Tokens"):
        sort(page, head, "desc")
        down = values(page, head)
        assert down == sorted(down, reverse=True)
        sort(page, head, "asc")
        assert values(page, head) == sorted(down)
    sort(page, "Name", "asc")
    names = page.locator("#table .open").all_text_contents()
    assert names == sorted(names)


def test_filters_and_resets(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["plain"])
    assert visible_rows(page) == len(RECORDS)
    page.locator("select[data-facet=pruner]").select_option(label="visionzip")
    zipped = sum(bool(r["spec"]["prune"]) and r["spec"]["prune"]["method"] == "visionzip" for r in RECORDS)
    assert visible_rows(page) == zipped > 0
    assert page.locator("#charted").text_content().startswith(f"{zipped} rows drawn")
    page.locator("#reset").click()
    page.locator("#search").fill(RECORDS[3]["run_id"])
    assert page.locator("#table .open").all_text_contents() == [RECORDS[3]["name"]]
    page.locator("#search").fill("no such row")
    assert "No row fits" in page.locator("#table tbody").text_content()
    page.locator("#reset").click()
    assert visible_rows(page) == len(RECORDS)


def test_paper_rows_are_shown_on_demand(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["plain"])
    paper = "gd => { const t = gd.data.find(t => t.name.startsWith('paper')); return [t.visible, t.x.length]; }"
    assert page.locator("#chart").evaluate(paper)[0] == "legendonly"
    page.locator("#paper").check()
    assert page.locator("#table tr.paper").count() == PAPER_ROWS
    assert page.locator("#table tr.paper .tag").first.text_content() == "paper"
    assert page.locator("#chart").evaluate(paper)[0] is True
    assert "28 rows of the paper" in page.locator("#shown").text_content()
    page.locator('#table tr.paper .open:text-is("combined")').click()
    dialog = page.locator("dialog[open]")
    assert "3429 / 4241" in dialog.text_content()
    assert "Table 2 of the paper does not print this column" in dialog.text_content()
    page.keyboard.press("Escape")
    page.locator("#paper").uncheck()
    assert page.locator("#table tr.paper").count() == 0


def test_cells_say_counts_intervals_and_reasons(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["plain"])
    row = page.locator('#table tr[data-row="1"]')
    cell = row.locator(f"td:nth-child({column(page, 'NAT')})")
    score = next(c for c in RECORDS[1]["scores"]["columns"] if c["name"] == "NAT")
    assert f"{100 * score['k'] / score['n']:.2f}" in cell.text_content()
    assert f"{score['k']}/{score['n']}" in cell.text_content()
    assert "95 % interval" in cell.get_attribute("title")
    unknown = row.locator(f"td:nth-child({column(page, 'G1-6')})")
    assert unknown.text_content() == "–"
    assert unknown.get_attribute("title") == "grade unknown for all questions"
    page.locator("#detail").uncheck()
    assert not cell.locator("small").is_visible()


def test_details_hold_the_spec_and_the_receipt(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["plain"])
    dialog = open_row(page, 5)
    dialog.locator(".yaml button").click()
    assert yaml.safe_load(page.evaluate("() => navigator.clipboard.readText()")) == RECORDS[5]["spec"]
    text = dialog.text_content()
    for part in (
        RECORDS[5]["receipt"]["summary"],
        "lm_head: left in 16 bits",
        "2.13.0+cpu",
        "b" * 64,
        "12.3",
    ):
        assert part in text
    assert dialog.locator("details tbody tr").count() == 0
    dialog.locator("details summary").click()
    dialog.locator("details tbody tr").last.wait_for()
    assert dialog.locator("details tbody tr").count() == len(RECORDS[5]["receipt"]["linears"])
    dialog.locator(".bar button").click()
    assert page.locator("dialog[open]").count() == 0
    page.locator('#table tr[data-row="2"] td:nth-child(4)').click()
    assert page.locator("dialog[open] h2").text_content() == RECORDS[2]["name"]


def test_theme_follows_the_system_and_the_button(show: Show, pages: dict[str, Path]) -> None:
    def brightness(page: Any) -> int:
        colour = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return int(colour.removeprefix("rgb(").split(",")[0])

    assert brightness(show(pages["plain"], scheme="dark")) < 60
    page = show(pages["plain"], scheme="light")
    assert brightness(page) > 200
    page.locator("#theme").click()
    assert brightness(page) < 60
    page.reload()
    assert brightness(page) < 60
    page.wait_for_selector("#chart .main-svg")
    page.locator("#theme").click()
    assert brightness(page) > 200


@pytest.mark.parametrize("name", ["plain", "hostile", "long", "empty"])
def test_never_scrolls_sideways_on_a_phone(show: Show, pages: dict[str, Path], name: str) -> None:
    page = show(pages[name], width=390, height=844)
    assert fits_sideways(page)
    box = page.locator("main .scroll").first
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    if name != "empty":
        dialog = open_row(page, 0)
        dialog.locator("details summary").click()
        dialog.locator("details tbody tr").last.wait_for()
        assert dialog.evaluate("dialog => dialog.scrollWidth <= dialog.clientWidth")
        assert fits_sideways(page)


def test_hostile_records_stay_text(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["hostile"])
    assert visible_rows(page) == len(HOSTILE)
    assert page.locator(f"#table tr[data-row='6'] td:nth-child({column(page, 'Model')})").text_content() == IMG
    dialog = open_row(page, 6)
    assert dialog.locator("h2").text_content() == SCRIPT_END + IMG
    dialog.locator("details summary").click()
    dialog.locator("details tbody tr").last.wait_for()
    assert IMG in dialog.locator("details tbody").text_content()
    assert IMG in dialog.locator("dl").last.evaluate("list => list.parentElement.parentElement.textContent")
    dialog.locator(".yaml button").click()
    shown = yaml.safe_load(dialog.locator(".yaml code").text_content())
    assert shown == HOSTILE[6]["spec"]
    dialog.locator(".bar button").click()
    for index in range(7, len(HOSTILE)):
        open_row(page, index).locator(".bar button").click()
    page.locator("select[data-facet=model]").select_option(label=IMG)
    assert visible_rows(page) == 1
    page.locator("#column").select_option(label=IMG)
    page.locator("#reset").click()
    drawn = page.locator("#chart .legendtext").all_text_contents()
    assert any(text.startswith("cdpruner</script>") for text in drawn)
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == len(show(pages["plain"]).locator("script").all())


def test_banner_only_for_stand_ins(show: Show, pages: dict[str, Path], tmp_path: Path) -> None:
    page = show(pages["plain"])
    assert "say nothing about LLaVA-7B" in page.locator(".banner").first.text_content()
    real = [{**record, "notes": ["seeded"]} for record in RECORDS]
    page = show(build(real, tmp_path / "real.html", title="A & B"))
    assert page.locator("header .banner").count() == 0
    assert page.locator("h1").text_content() == "A & B"


def test_chart_draws_every_row_with_its_interval(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["long"])
    assert visible_rows(page) == 200
    traces = page.locator("#chart").evaluate(
        "gd => gd.data.map(t => [t.name, t.customdata, t.y, t.error_y.array, t.error_y.arrayminus])"
    )
    drawn = {}
    for name, rows, y, up, down in traces:
        if not name.startswith("paper"):
            points = zip(rows, y, up, down, strict=True)
            drawn |= {row: tuple(rest) for row, *rest in points if row is not None}
    data = json.loads(pages["long"].with_suffix(".json").read_text("utf-8"))
    assert set(drawn) == set(range(200))
    for index, (y, up, down) in drawn.items():
        cell = data[index]["cells"]["Avg"]
        assert [y, y + up, y - down] == pytest.approx([100 * cell[key] for key in ("accuracy", "high", "low")])


def test_csv_and_json_are_the_table(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["plain"])
    page.locator("#paper").check()
    assert page.locator("#csv").get_attribute("href") == "plain.csv"
    with pages["plain"].with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    data = json.loads(pages["plain"].with_suffix(".json").read_text("utf-8"))
    assert len(lines) == len(data) == len(RECORDS) + PAPER_ROWS == visible_rows(page)
    heads = page.locator("#table thead th").all_text_contents()
    scores = heads[heads.index("Tokens") + 1 : heads.index("Receipt")]
    for index, (line, row) in enumerate(zip(lines, data, strict=True)):
        shown = page.locator(f'#table tr[data-row="{index}"] td')
        orders = shown.evaluate_all("cells => cells.map(cell => cell.dataset.order)")
        texts = shown.evaluate_all("cells => cells.map(cell => cell.firstChild.textContent)")
        assert texts[0] == line["name"] == row["name"]
        for position, key in enumerate(("model", "quantization", "pruner", "sensitivity", "fusion"), start=1):
            assert texts[position] == line[key] == row[key]
        for position, head in enumerate(scores, start=heads.index("Tokens") + 1):
            cell = row["unparsed"] if head == "Unparsed" else row["cells"][head]
            key = head.lower() if head == "Unparsed" else head
            if cell["accuracy"] is None:
                assert (texts[position], line[key]) == ("–", "")
            else:
                assert float(orders[position]) == cell["accuracy"]
                assert texts[position] == line[key] == f"{100 * cell['accuracy']:.2f}"
                assert (line[f"{key} k"], line[f"{key} n"]) == (str(cell["k"]), str(cell["n"]))
