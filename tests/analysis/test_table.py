"""Tables at the widths of small terminals: every head and every number can be read."""

import io

import pytest
from rich.console import Console

from qapbench.analysis.paired import Comparison, Difference
from qapbench.analysis.table import comparison_table


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


def test_wide_terminals_get_one_line_per_row() -> None:
    assert any("NAT" in line and "4.56e-09" in line and "97.24" in line for line in printed(120).splitlines())
