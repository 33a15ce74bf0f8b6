"""A table of many figures that stays readable however narrow the terminal is."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

NAME = 24  # characters of a name beside which figures still stand in columns; a longer one is folded


def fitted(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str], width: int) -> Table:
    """A table with one row per run. What does not fit into columns is listed below each other, and nothing is cut.

    Args:
        title: title of the table.
        heads: heads of the columns. The first one is that of the names.
        rows: a name and its figures for each row.
        notes: lines below the table.
        width: characters per line.
    """
    table = Table(title=title, title_justify="left", caption=escape("\n".join(notes)), caption_justify="left")
    widest = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    if min(widest[0], NAME) + sum(widest[1:]) + 3 * len(heads) + 1 <= width:
        table.add_column(heads[0], style="bold", overflow="fold")
        for head in heads[1:]:
            table.add_column(head, justify="right", no_wrap=True)
        for name, *cells in rows:
            table.add_row(*map(escape, (name, *cells)))
        return table
    room = max(width - min(widest[0], NAME) - 7, 1)
    table.add_column(heads[0], style="bold", overflow="fold", max_width=NAME)
    table.add_column("figures", overflow="fold")
    for name, *cells in rows:
        pairs = [f"{head} {cell}" for head, cell in zip(heads[1:], cells, strict=True)]
        table.add_row(escape(name), escape(_lines(pairs, room)))
    table.show_lines = True
    return table


def _lines(parts: Sequence[str], width: int) -> str:
    """The parts with commas between them, in lines of so many characters where they fit."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 2 + len(part) < width:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    return "\n".join(lines)
