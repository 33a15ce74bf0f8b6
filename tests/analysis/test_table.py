"""Tables at the widths of small terminals: every head and every number can be read."""

import io

import pytest
from rich.console import Console
from small_records import small_record

from qapbench.analysis.fitting import fitted
from qapbench.analysis.paired import Comparison, Difference
from qapbench.analysis.study import TARGETS, Correlation, Predictor, Summary
from qapbench.analysis.table import ablation_table, comparison_table, study_table
from qapbench.cli.console import VisibleConsole


def printed(width: int, n: int = 4241) -> str:
    names = ("NAT", "G7-12", "Avg")
    rows = [Difference(name, n, n - 1, n - 117, 123, 239, -0.1154, 0.1154, 1.23e-10, 4.56e-9) for name in names]
    console = Console(width=width, file=io.StringIO())
    console.print(comparison_table(Comparison("dense", "combined", rows, [], []), width))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_compare_shows_every_head_and_number(width: int) -> None:
    text = printed(width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text.replace(" … ", "")
    for word in ("column", "first", "second", "difference", "95 % interval", "gained", "lost", "99.98", "97.24"):
        assert word in text
    for number in ("G7-12", "4241", "-2.74", "-11.54 … +11.54", "123", "239", "1.23e-10", "4.56e-09"):
        assert text.count(number) >= 1, number


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_figure_is_cut_however_narrow_the_terminal_is(width: int) -> None:
    heads = ["run", "x layers", "TFLOPs", "of dense", "T BOPs", "weights GB", "prompt >= ms"]
    rows = [
        ["[b]a name of more characters than a column has[/]", "22.2 %", "0.0009913", "56.9 %", "0.0005136", "7", "8.1"],
        ["short", "100.0 %", "0.001743", "100.0 %", "0.001743", "0.01022", "0.0031 (memory)"],
    ]
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(fitted("A title", heads, rows, ["a [note]"], width))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, said.splitlines())) <= width
    assert "…" not in said
    assert "[note]" in said
    for row in rows:
        for head, cell in zip(heads[1:], row[1:], strict=True):
            assert cell in said
            assert head in said
    assert ("figures" in said) == (width < 100)
    assert "".join(line.split("│")[1].strip() for line in said.splitlines() if line.startswith("│"))


def test_wide_terminals_get_one_line_per_row() -> None:
    assert any("NAT" in line and "4.56e-09" in line and "97.24" in line for line in printed(120).splitlines())


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_study_shows_every_correlation_and_its_interval(width: int) -> None:
    found = {name: Correlation(rho=0.123, low=-0.25, high=0.5, n=9) for name in TARGETS}
    scores = [Predictor(name="outlier_intensity", kind="metric", correlations=found)]
    scores.append(Predictor(name="cdpruner", kind="relevance", correlations=found))
    known = {"name": "combined", "task": "t", "questions": 9, "units": 90, "changed": 0.1}
    summary = Summary.model_construct(**known, targets=TARGETS, predictors=scores)
    console = VisibleConsole(width=width, file=io.StringIO())
    console.print(study_table(summary, width))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text.replace(" … ", "")
    assert text.count("+0.123") == text.count("-0.25 … +0.50") == 2 * len(TARGETS)
    first = "".join(line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│"))
    assert first.replace(" ", "") == "outlier_intensitycdpruner(relevance)"
    assert all(name in text for name in TARGETS)


@pytest.mark.parametrize("width", [60, 80])
def test_accuracies_that_have_no_room_are_named(width: int) -> None:
    names = ["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg"]
    columns = [{"name": name, "k": 1, "n": 3, "accuracy": 1 / 3} for name in names]
    console = VisibleConsole(width=width, file=io.StringIO())
    console.print(ablation_table([small_record(columns, name="a_name_of_a_run_" * 4)], width))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert all(name in text for name in names)
    assert text.count("33.33") + len(text.partition("for lack of width: ")[2].split(", ")) == len(names)


def test_the_interval_is_that_of_the_tasks_score() -> None:
    """A task of lm-eval's may list its score first; the last column and the interval are still the score's."""
    columns = [
        {"name": "acc", "k": 3, "n": 4, "accuracy": 0.75, "low": 0.3, "high": 0.95},
        {"name": "brier_score", "n": 4, "figure": 0.28},
    ]
    record = small_record(columns, schema=3, task={"name": "t", "questions": 4, "score": "acc"})
    console = VisibleConsole(width=120, file=io.StringIO())
    console.print(ablation_table([record], 120))
    text = console.file.getvalue()
    assert text.index("brier_score") < text.index("acc ")
    assert "30.0–95.0" in text
    assert "Wilson interval of acc" in text
