"""Records and scores as terminal tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.markup import escape
from rich.table import Table

from .paired import Comparison

NAME, FIXED, COLUMN = 28, 36, 9  # widths of the run's name, of tokens + interval + n, of one accuracy


def ablation_table(records: Iterable[dict[str, Any]], width: int = 200) -> Table:
    """One row a run: measured tokens, accuracies in percent, the interval of the last one.

    Columns that do not fit in `width` characters are left out from the front; the page has them all.
    """
    records = list(records)
    names = list(dict.fromkeys(column["name"] for r in records for column in r["scores"]["columns"]))
    shown = names[-max(1, (width - NAME - FIXED) // COLUMN) :]
    table = Table(title="Accuracy, % (Wilson 95 % interval of the last column)", title_justify="left")
    table.add_column("run", style="bold", overflow="fold", min_width=NAME - 4)
    table.add_column("tokens", justify="right", no_wrap=True)
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("interval", justify="right", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for record in records:
        columns = {column["name"]: column for column in record["scores"]["columns"]}
        last = columns.get(names[-1], {}) if names else {}
        table.add_row(
            escape(record["name"]), f"{record['tokens']['mean']:g}" if record.get("tokens") else "–",
            *(_cell(columns.get(name)) for name in shown), _interval(last), str(last.get("n", "")),
        )  # fmt: skip
    if len(shown) < len(names):
        table.caption = f"not shown for lack of width: {', '.join(names[: -len(shown)])}"
    return table


def scores_table(scores: dict[str, Any]) -> Table:
    """One row a column: accuracy, counts, interval; or why it is unavailable."""
    table = Table()
    for name in ("column", "accuracy", "k / n", "95 % interval"):
        table.add_column(name, justify="left" if name == "column" else "right")
    for column in scores["columns"]:
        if "unavailable" in column:
            table.add_row(escape(column["name"]), "–", "", escape(column["unavailable"]))
        else:
            table.add_row(escape(column["name"]), _cell(column), f"{column['k']} / {column['n']}", _interval(column))
    unparsed = scores["unparsed"]
    table.add_row("unparsed", f"{100 * unparsed['rate']:.2f}", f"{unparsed['k']} / {unparsed['n']}", "")
    return table


def comparison_table(comparison: Comparison) -> Table:
    """One row a column: both accuracies, the paired difference with its interval, flips and p."""
    table = Table(
        title=escape(f"{comparison.second} against {comparison.first}"), title_justify="left",
        caption="paired: points, bootstrap 95 % interval, exact McNemar p (not corrected for many columns)",
    )  # fmt: skip
    table.add_column("column")
    for name in ("n", "first", "second", "difference", "95 % interval", "gained", "lost", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in comparison.differences:
        table.add_row(
            escape(row.column), str(row.n), f"{100 * row.first / row.n:.2f}", f"{100 * row.second / row.n:.2f}",
            f"{100 * row.difference:+.2f}", f"{100 * row.low:+.2f} … {100 * row.high:+.2f}",
            str(row.gained), str(row.lost), f"{row.p:.3g}",
        )  # fmt: skip
    return table


def _cell(column: dict[str, Any] | None) -> str:
    return "–" if not column or column.get("accuracy") is None else f"{100 * column['accuracy']:.2f}"


def _interval(column: dict[str, Any]) -> str:
    if column.get("low") is None:
        return ""
    return f"{100 * column['low']:.1f}–{100 * column['high']:.1f}"
