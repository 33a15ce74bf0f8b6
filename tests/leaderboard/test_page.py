"""The page as a reader meets it: in a browser, offline, with friendly and with hostile records.

Opening 200 rows takes well under a second; nothing here asserts a time, which would measure the machine.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from leaderboard_records import IMG, SCRIPT_END, ablation, damaged, hostile
from leaderboard_runs import FIRST, KEEP, QUESTIONS, TOKENS, write_questions, write_runs, write_several, write_study
from scipy.stats import false_discovery_control

from qapbench.leaderboard import build
from qapbench.records.load import load_records
from qapbench.visible import visible

RECORDS = ablation(12)
HOSTILE = ablation(6) + hostile()
PAPER_ROWS = 28
TASKS = ("scienceqa", "scienceqa (2)")
SCORES = ("Avg", "NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
Show = Callable[..., Any]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    sets = {"plain": RECORDS, "hostile": [*HOSTILE, *damaged().values()], "long": ablation(200), "empty": []}
    built = {name: build(records, folder / f"{name}.html") for name, records in sets.items()}
    for name in ("whole", "attacked"):  # with answers, images and a study
        runs = folder / f"{name} runs"
        write_runs(runs, write_questions(folder / f"{name}.parquet", hostile=name == "attacked"))
        write_study(runs, hostile=name == "attacked")
        built[name] = build(load_records(runs), folder / f"{name}.html", runs=runs)
    write_several(folder / "several runs")
    runs = folder / "several runs"
    built["several"] = build(load_records(runs), folder / "several.html", runs=runs)
    return built


HEADS = "#table thead th[data-key]"


def column(page: Any, head: str) -> int:
    """Place of a column among those that are shown, from 1."""
    heads = page.locator(HEADS).all_text_contents()
    return next(i for i, text in enumerate(heads) if text.strip() == head) + 1


def values(page: Any, head: str) -> list[float]:
    cells = page.locator(f"#table tbody td:nth-child({column(page, head)})")
    return [float(value) for value in cells.evaluate_all("cells => cells.map(cell => cell.dataset.order)")]


def sort(page: Any, head: str, direction: str) -> None:
    """Click a head, and wait until the table is in that order."""
    page.locator(HEADS).nth(column(page, head) - 1).click()
    page.locator(f"{HEADS}.dt-ordering-{direction}:has-text('{head}')").wait_for()


def visible_rows(page: Any) -> int:
    page.settled()
    return page.locator("#table tbody tr[data-row]").count()


def open_row(page: Any, index: int) -> Any:
    """Open the details of the record with that index, and return the dialog."""
    page.locator(f'#table tr[data-row="{index}"] .open').click()
    return page.locator("dialog[open]")


def scripts_of(path: Path) -> int:
    """How many scripts a page has when it has started Plotly, which adds one."""
    found: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, _: found.append(tag)  # type: ignore[method-assign,assignment]
    parser.feed(path.read_text("utf-8"))
    return found.count("script") + 1


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
    page.settled()
    assert page.locator("#table tr.paper").count() == PAPER_ROWS
    assert page.locator("#table tr.paper .tag").first.text_content() == "paper, unpaired"
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
    page.locator(f'#table tr[data-row="2"] td:nth-child({column(page, "Pruner")})').click()
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
    page.settled()
    page.locator("#theme").click()
    assert brightness(page) > 200


@pytest.mark.parametrize("name", ["plain", "hostile", "long", "empty", "whole", "attacked"])
def test_never_scrolls_sideways_on_a_phone(show: Show, pages: dict[str, Path], name: str) -> None:
    page = show(pages[name], width=390, height=844)
    assert fits_sideways(page)
    box = page.locator("main .scroll").first
    assert box.evaluate("box => box.scrollWidth > box.clientWidth")
    if name != "empty":
        dialog = open_row(page, 0)
        if dialog.locator("details").count():
            dialog.locator("details summary").click()
            dialog.locator("details tbody tr").last.wait_for()
        assert dialog.evaluate("dialog => dialog.scrollWidth <= dialog.clientWidth")
        assert fits_sideways(page)


def test_hostile_records_stay_text(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["hostile"])
    assert visible_rows(page) == len(HOSTILE)
    assert page.locator(f"#table tr[data-row='6'] td:nth-child({column(page, 'Model')})").text_content() == IMG
    dialog = open_row(page, 6)
    assert dialog.locator("h2").text_content() == visible(SCRIPT_END + IMG)
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
    page.settled()
    drawn = page.locator("#chart .legendtext").all_text_contents()
    assert any(text.startswith("cdpruner</script>") for text in drawn)
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == scripts_of(pages["plain"])


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
        "gd => gd.data.filter(t => t.error_y)"
        ".map(t => [t.name, t.customdata, t.y, t.error_y.array, t.error_y.arrayminus])"
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


def downloaded(page: Any, kind: str) -> str:
    """The text that a click on the link of one of the tables saves."""
    with page.expect_download() as saved:
        page.locator(f"#{kind}").click()
    assert saved.value.suggested_filename == f"plain.{kind}"
    return Path(saved.value.path()).read_bytes().decode()


def test_csv_and_json_are_the_table(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["plain"])
    page.locator("#paper").check()
    lines = list(csv.DictReader(io.StringIO(downloaded(page, "csv"))))
    data = json.loads(downloaded(page, "json"))
    assert len(lines) == len(data) == len(RECORDS) + PAPER_ROWS == visible_rows(page)
    heads = page.locator(HEADS).all_text_contents()
    for index, (line, row) in enumerate(zip(lines, data, strict=True)):
        cells = page.locator(f'#table tr[data-row="{index}"] td')
        orders = cells.evaluate_all("cells => cells.map(cell => cell.dataset.order)")
        texts = cells.evaluate_all("cells => cells.map(cell => cell.firstChild.textContent)")
        shown = dict(zip(heads, zip(texts, orders, strict=True), strict=True))
        assert shown["Name"][0] == line["name"] == row["name"]
        for key in ("model", "quantization", "pruner", "sensitivity", "fusion"):
            assert shown[key.capitalize()][0] == line[key] == row[key]
        for head in (*SCORES, "Unparsed"):
            cell = row["unparsed"] if head == "Unparsed" else row["cells"][head]
            key = head.lower() if head == "Unparsed" else head
            if cell["accuracy"] is None:
                assert (shown[head][0], line[key]) == ("–", "")
            else:
                assert float(shown[head][1]) == cell["accuracy"]
                assert shown[head][0] == line[key] == f"{100 * cell['accuracy']:.2f}"
                assert (line[f"{key} k"], line[f"{key} n"]) == (str(cell["k"]), str(cell["n"]))


# -- with the runs' answers at hand --


def row_named(page: Any, name: str) -> int:
    return page.evaluate(
        "name => JSON.parse(document.getElementById('data').textContent).rows.findIndex(row => row.name === name)", name
    )


def traces(page: Any, chart: str) -> dict[str, Any]:
    page.settled()
    found = page.locator(f"#{chart}").evaluate("gd => gd.data.map(t => ({name: t.name, x: t.x, y: t.y, meta: t.meta}))")
    return {trace["name"]: trace for trace in found}


@pytest.mark.parametrize(("width", "height", "touch"), [(1280, 900, False), (390, 844, True)])
def test_no_button_and_no_link_reaches_a_host(
    show: Show, pages: dict[str, Path], width: int, height: int, touch: bool
) -> None:
    """Everything that can be clicked is clicked; `show` notes each request and each popup."""
    page = show(pages["whole"], width=width, height=height, touch=touch)
    for kind in ("csv", "json"):
        assert page.locator(f"#{kind}").get_attribute("href") == f"whole.{kind}"
    for select in page.locator("main select").all():
        if select.is_visible():  # a filter may leave another one nothing to choose from
            select.select_option(index=select.locator("option").count() - 1)
            page.settled()
    page.locator("#reset").click()
    tools = page.locator(".modebar-btn")
    page.settled()
    assert tools.count() == (0 if touch else 18)  # six on each of three charts
    for chart in page.locator(".chart:visible").all():
        chart.scroll_into_view_if_needed()
        chart.hover()
        for tool in chart.locator(".modebar-btn").all():
            tool.click()
        for name in chart.locator(".legendtoggle").all():
            name.click(force=True)
    for selector in ("main summary", "header button", "main .tools button", ".chip", "nav a", "#table th[data-key]"):
        for element in page.locator(f"{selector}:visible").all():
            element.click()
            page.settled()
    if touch:
        page.locator("[data-columns=Compression]").click()
    for index in range(page.locator("#table .open").count()):
        page.locator("#table .open").nth(index).click()
        dialog = page.locator("dialog[open]")
        for element in dialog.locator("summary, .yaml button").all():
            element.click()
        dialog.locator(".bar button").click()
    links = page.locator("a:visible").evaluate_all("links => links.map(link => link.href)")
    assert links
    assert {link.partition(":")[0] for link in links} == {"file"}
    assert "plot.ly" not in page.locator("body").inner_html().replace(page.locator("#plotly").inner_html(), "")
    assert page.url.startswith("file:")


def test_filters_offer_what_the_rows_have(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["plain"])

    def offered(facet: str) -> set[str]:
        select = page.locator(f"select[data-facet={facet}] option")
        return set(select.all_text_contents()) - {"all"}

    rows = [row for row in json.loads(pages["plain"].with_suffix(".json").read_text("utf-8")) if row["kind"] == "run"]
    assert offered("pruner") == {row["pruner"] for row in rows}
    assert not page.locator("select[data-facet=model]").is_visible() or len(offered("model")) > 1
    page.locator("#paper").check()
    page.settled()
    assert any("LLaVA" in name for name in offered("model"))
    page.locator("#paper").uncheck()
    page.locator("select[data-facet=pruner]").select_option(label="visionzip")
    page.settled()
    assert offered("sensitivity") <= {row["sensitivity"] for row in rows if row["pruner"] == "visionzip"}
    page.locator("#reset").click()
    page.settled()
    assert offered("sensitivity") <= {row["sensitivity"] for row in rows}


def test_a_chart_with_nothing_to_draw_is_left_out(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["empty"])
    assert page.locator(".chart:visible").count() == 0
    assert "No row of the table" in page.locator("#metricked").text_content()
    page.locator("#paper").check()
    page.settled()
    assert page.locator("#chart").is_visible()
    page = show(pages["plain"])
    page.locator("#search").fill("no such row")
    page.settled()
    assert page.locator(".chart:visible").count() == 0
    page.locator("#reset").click()
    page.settled()
    assert page.locator("#chart").is_visible()
    page.locator("#chart .point").first.wait_for()


def test_unfinished_runs_are_listed_with_their_counts(tmp_path: Path, show: Show) -> None:
    runs = tmp_path / "runs"
    records = write_runs(runs, write_questions(tmp_path / "test.parquet"), ["full", "dense"])
    begun = runs / records[1].run_id
    (begun / "spec.json").write_text(json.dumps({**records[1].spec, "name": "begun \u202e"}))
    (begun / "record.json").unlink()
    lines = (begun / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (begun / "answers.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:9])
    (runs / "0123456789abcdef").mkdir()
    (runs / "0123456789abcdef" / "spec.json").write_text("{")
    page = show(build(load_records(runs), tmp_path / "board.html", runs=runs))
    assert page.locator("#unfinished li").all_text_contents() == [
        "0123456789abcdef: 0 answered",
        f"begun \\u202e: 7 of {QUESTIONS} answered",
    ]
    assert visible_rows(page) == 1


def test_hidden_characters_are_shown_escaped(show: Show, tmp_path: Path) -> None:
    name = "a\x1b[31m\x00b\u202ec\u2066d\u200be \N{FAMILY}\u200d"
    shown = "a\\x1b[31m\\x00b\\u202ec\\u2066d\\u200be \N{FAMILY}\u200d"
    record = {**ablation(1)[0], "name": name}
    record["receipt"] = {"summary": name, "fallbacks": [name]}
    record["spec"] = {**record["spec"], "model": name}
    page = show(build([record], tmp_path / "board.html", title=name))
    assert page.title() == shown
    dialog = open_row(page, 0)
    assert dialog.locator("h2").text_content() == shown
    assert yaml.safe_load(dialog.locator(".yaml code").text_content()) == record["spec"]
    assert page.locator("#table .open").text_content() == shown
    data = (tmp_path / "board.json").read_text("utf-8")
    assert json.loads(data)[0]["name"] == name
    for text in (page.content(), data, (tmp_path / "board.csv").read_text("utf-8")):
        assert not set(text) & set("\x00\x1b\u202e\u2066\u200b")
    assert shown in (tmp_path / "board.csv").read_text("utf-8")


def test_column_groups_are_shown_and_hidden(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["whole"])
    heads = page.locator(HEADS)
    assert "NAT" in heads.all_text_contents()
    assert "Model" not in heads.all_text_contents()  # it is the same in every row, which a line says
    assert "model tiny" in page.locator("#same").text_content()
    page.locator("[data-columns=Subject]").click()
    assert not {"NAT", "SOC", "LAN"} & set(heads.all_text_contents())
    assert "Subject" not in page.locator("#table tr.groups").text_content()
    assert values(page, "IMG")  # the cells moved with their heads
    page.locator("[data-columns=Subject]").click()
    assert {"NAT", "SOC", "LAN"} <= set(heads.all_text_contents())
    page.locator("#paper").check()
    assert "Model" in heads.all_text_contents()
    phone = show(pages["whole"], width=390, height=844)
    assert "NAT" not in phone.locator(HEADS).all_text_contents()
    assert "Avg" in phone.locator(HEADS).all_text_contents()


def test_ranks_and_references_are_in_the_table_and_the_details(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["whole"])
    rows = json.loads(pages["whole"].with_suffix(".json").read_text("utf-8"))
    index = row_named(page, "l2")
    against = rows[index]["against"]["semantic"]
    cell = page.locator(f'#table tr[data-row="{index}"] td:nth-child({column(page, "semantic only")})')
    assert f"+{against['gained']} −{against['lost']}" in cell.text_content()
    assert "against semantic:" in cell.get_attribute("title")
    assert "exact McNemar p" in cell.get_attribute("title")
    ranks = values(page, "#")
    assert ranks == sorted(ranks)
    text = open_row(page, index).text_content()
    assert f"Rank {rows[index]['rank']} among 5 rows" in text
    assert "semantic only" in text
    assert "qapbench run spec.yaml" in text


def test_charts_have_the_frontier_and_the_references_as_lines(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["whole"])
    rows = json.loads(pages["whole"].with_suffix(".json").read_text("utf-8"))
    own = [row for row in rows if row["kind"] == "run"]
    drawn = traces(page, "chart")
    best = {
        index
        for index, row in enumerate(own)
        if not any(
            other["tokens"] <= row["tokens"] and other["cells"]["Avg"]["k"] > row["cells"]["Avg"]["k"] for other in own
        )
    }
    frontier = set(drawn["Pareto frontier"]["meta"])
    assert frontier <= best
    assert {own[i]["tokens"] for i in frontier} == {own[i]["tokens"] for i in best}
    for name, trace in (("dense", "dense"), ("full", "full precision: full")):
        index = row_named(page, name)
        assert set(drawn[trace]["y"]) == {100 * own[index]["cells"]["Avg"]["accuracy"]}
    drawn = traces(page, "metrics")
    (points,) = (trace for name, trace in drawn.items() if "tokens" in name)
    metric = [row for row in own if row["sensitivity"] != "none"]
    assert sorted(points["y"]) == sorted(100 * row["cells"]["Avg"]["accuracy"] for row in metric)
    page.locator("#column").select_option(label="IMG")
    assert sorted(traces(page, "metrics")[points["name"]]["y"]) == sorted(
        100 * row["cells"]["IMG"]["accuracy"] for row in metric
    )


def test_the_heat_rows_are_differences_and_accuracies(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["whole"])
    rows = json.loads(pages["whole"].with_suffix(".json").read_text("utf-8"))
    index, dense = row_named(page, "l2"), row_named(page, "dense")
    heads = [text.split("n ")[0] for text in page.locator("#heat thead th").all_text_contents()]
    line = page.locator("#heat tbody tr").filter(has=page.locator("th:text-is('l2')"))
    shown = line.locator("td").nth(heads.index("IMG") - 1)
    share = [rows[place]["cells"]["IMG"]["accuracy"] for place in (index, dense)]
    assert shown.text_content().replace("−", "-") == f"{100 * (share[0] - share[1]):+.1f}"
    assert page.locator("#heat tbody tr").count() == 3
    page.locator("#heat-mode").select_option("accuracy")
    assert shown.text_content() == f"{100 * share[0]:.1f}"
    assert page.locator("#heat tbody tr").count() == 5
    page.locator("#search").fill("l2")
    page.settled()
    assert page.locator("#heat tbody tr").count() == 1


def test_flipped_questions_show_image_and_both_masks(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["whole"])
    data = json.loads(page.locator("#data").text_content())
    index = row_named(page, "l2")
    page.locator("#flip-row").select_option(str(index))
    (flips,) = data["flips"]["rows"][str(index)]
    cards = page.locator("#flips .flip")
    assert cards.count() == len(flips["gained"]["shown"]) + len(flips["lost"]["shown"]) > 0
    assert f"{flips['gained']['count']} question" in page.locator("#flips h3").first.text_content()
    first = cards.first
    boxes = first.locator("path").evaluate_all("paths => paths.map(p => p.getAttribute('d').split('M').length - 1)")
    assert boxes == [TOKENS - KEEP, KEEP, TOKENS - KEEP, KEEP]
    assert first.locator("image").first.get_attribute("href").startswith("data:image/")
    assert first.locator(".wrong").count() == first.locator(".right").count() == 1
    assert open_row(page, index).locator(".flip").count() == cards.count()


def test_the_study_has_a_figure_and_a_table(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["whole"])
    lines = page.locator("#study-table tbody tr")
    assert lines.first.locator("td").first.text_content() == "l2"
    assert "+0.250" in lines.first.text_content()
    assert "–" in lines.last.text_content()
    drawn = traces(page, "study-chart")
    assert drawn["answer, quantized"]["x"] == [None, 0.25]
    assert "12 questions" in page.locator("#study-text").text_content()
    assert 'id="studies"' in pages["whole"].read_text("utf-8")
    assert 'id="studies"' not in pages["plain"].read_text("utf-8")


def test_hostile_questions_answers_and_studies_stay_text(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["attacked"])
    page.locator("#flip-row").select_option(index=1)
    card = page.locator("#flips .flip").first
    assert card.locator(".asked").text_content().startswith(visible(SCRIPT_END))
    assert IMG in card.locator(".choices").text_content()
    assert IMG in card.locator(".id").text_content()
    assert visible(SCRIPT_END) in page.locator("#study-text").text_content()
    assert visible(SCRIPT_END + IMG) in page.locator("#study-table").text_content()
    assert any("</script>" in text for text in page.locator("#study-chart text").all_text_contents())
    open_row(page, row_named(page, "l2"))
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == scripts_of(pages["plain"])


def rows_of(page: Path) -> dict[str, dict[str, Any]]:
    """The rows of runs in the JSON beside a page, by their names."""
    listed = json.loads(page.with_suffix(".json").read_text())
    return {row["name"]: row for row in listed if row["kind"] == "run"}


def test_several_tasks_have_a_group_of_columns_each(show: Show, pages: dict[str, Path]) -> None:
    page = show(pages["several"])
    assert visible_rows(page) == len(FIRST), "the runs of one task each have no rows of their own"
    heads = [text.strip() for text in page.locator("#table tr.groups th").all_text_contents()]
    assert heads[3:6] == ["Overall", "scienceqa", "scienceqa (2)"], "the other columns of a task wait for their button"
    relative = values(page, "Relative")
    assert relative == sorted(relative, reverse=True)
    rows = rows_of(pages["several"])
    for name in FIRST:
        cells = rows[name]["cells"]
        shares = [cells[task]["accuracy"] / rows["full"]["cells"][task]["accuracy"] for task in TASKS]
        assert rows[name]["relative"]["accuracy"] == pytest.approx(sum(shares) / 2)
    against = [rows[name]["by_task"][task]["against"] for name in FIRST for task in TASKS]
    tests = [one for references in against for one in references.values()]
    q = false_discovery_control([one["p"] for one in tests])
    assert [one["q"] for one in tests] == pytest.approx(list(q)), "corrected over all that is shown"
    assert tests
    sort(page, "Relative", "asc")
    page.locator("[data-columns='scienceqa, by column']").click()
    assert column(page, "NAT") < column(page, "G7-12")
    details = open_row(page, list(rows).index("combined"))
    for label in TASKS:
        for reference in ("dense", "semantic only"):
            assert details.get_by_text(f"{label}, {reference}", exact=True).count() == 1
        assert details.locator("h3").filter(has_text=f"{label}: ").count() == 2, "gained and lost"
    assert details.get_by_text("Flipped against semantic only", exact=True).count() == 0
    assert details.get_by_text("Flipped against semantic", exact=True).count() == 1
    assert details.locator(".flip").count() > 2


def test_the_csv_of_several_tasks_has_all_of_them(pages: dict[str, Path]) -> None:
    table = pd.read_csv(pages["several"].with_suffix(".csv"))
    table = table[table["kind"] == "run"].set_index("name")
    rows = rows_of(pages["several"])
    for name in FIRST:
        assert table.loc[name, "relative average"] == pytest.approx(100 * rows[name]["relative"]["accuracy"], abs=0.005)
        for task in TASKS:
            assert table.loc[name, task] == pytest.approx(100 * rows[name]["cells"][task]["accuracy"], abs=0.005)
            assert table.loc[name, f"{task} rank"] == rows[name]["by_task"][task]["rank"]
            dense = rows[name]["by_task"][task]["against"].get("dense")
            shown = table.loc[name, f"{task} dense q"]
            assert pd.isna(shown) if dense is None else shown == pytest.approx(dense["q"])
