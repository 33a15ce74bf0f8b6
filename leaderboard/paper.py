"""The paper's published numbers as rows: printed percentages in paper.json, their integers derived here."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from .rows import NONE, Cell, Row, counted

MISSING = "Table {table} of the paper does not print this column"


@cache
def reference() -> dict[str, Any]:
    """The content of paper.json."""
    data: dict[str, Any] = json.loads((Path(__file__).parent / "paper.json").read_text("utf-8"))
    return data


def as_count(printed: float, n: int) -> int | None:
    """The k whose 100 * k / n prints as `printed` with two digits, or None where there is no such integer."""
    k = round(printed / 100 * n)
    return k if f"{100 * k / n:.2f}" == f"{printed:.2f}" else None


def _cell(printed: float, n: int) -> Cell:
    k = as_count(printed, n)
    return Cell(n=n, accuracy=printed / 100) if k is None else counted(k, n)


def paper_rows() -> list[Row]:
    """One row per published line, in the paper's order."""
    data = reference()
    rows = []
    for table in data["tables"]:
        absent = Cell(reason=MISSING.format(table=table["table"]))
        for line in table["rows"]:
            printed = dict(zip(table["columns"], line["printed"], strict=True))
            rows.append(
                Row(
                    kind="paper",
                    name=line["name"],
                    model=line["model"],
                    quantization=line["quantization"],
                    pruner=line["pruner"] or NONE,
                    sensitivity=line["sensitivity"] or NONE,
                    fusion=NONE,
                    keep=line["tokens"] if line["pruner"] else None,
                    available=None if line["pruner"] else line["tokens"],
                    cells={
                        name: _cell(printed[name], n) if name in printed else absent
                        for name, n in data["questions"].items()
                    },
                    unparsed=Cell(reason="not stated in the paper"),
                    run_id=f"arXiv {data['source']['arxiv']}, Table {table['table']}",
                )
            )
    return rows
