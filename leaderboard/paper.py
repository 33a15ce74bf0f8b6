"""The paper's published numbers as rows. paper.json holds the printed percentages; counts are derived from them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from qapbench.analysis.ranking import Against, Kind, Ranking, corrected_together, count_ranks, unpaired_difference

from .ranking import UNTOUCHED, with_ranking
from .rows import NONE, Row, Score, counted

OVERALL = "Avg"
MISSING = "Table {table} of the paper does not print this column"


@cache
def reference() -> dict[str, Any]:
    """The content of paper.json."""
    data: dict[str, Any] = json.loads((Path(__file__).parent / "paper.json").read_text("utf-8"))
    return data


def as_count(printed: float, n: int) -> int | None:
    """The count k for which 100 * k / n prints as `printed` with two decimals; None if no integer does.

    Args:
        printed: the percentage.
        n: number of questions.
    """
    k = round(printed / 100 * n)
    return k if f"{100 * k / n:.2f}" == f"{printed:.2f}" else None


def _cell(printed: float, n: int) -> Score:
    """The score of a printed percentage, with counts if they can be derived."""
    k = as_count(printed, n)
    return Score(n=n, accuracy=printed / 100) if k is None else counted(k, n)


def paper_rows(start: int = 0) -> list[Row]:
    """One row per published line, in the paper's order. They are compared by counts, since no answers are published.

    Args:
        start: index on the page of the first of them.
    """
    return _compared(_published(), start)


def _published() -> list[Row]:
    """The published lines as rows, not yet compared."""
    data = reference()
    rows = []
    for table in data["tables"]:
        absent = Score(reason=MISSING.format(table=table["table"]))
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
                    unparsed=Score(reason="not stated in the paper"),
                    run_id=f"arXiv {data['source']['arxiv']}, Table {table['table']}",
                )
            )
    return rows


def _compared(rows: list[Row], start: int) -> list[Row]:
    """The rows with ranks, references and remarks, all tested as independent samples."""
    n = reference()["questions"][OVERALL]
    counts = [row.cells[OVERALL].k or 0 for row in rows]
    ranks = count_ranks(counts, n)
    found = []
    for index, row in enumerate(rows):
        against = {
            kind: Against(other, unpaired_difference(OVERALL, counts[other], counts[index], n), paired=False)
            for kind, other in _references(row, rows).items()
        }
        found.append(Ranking(ranks[index], len(rows), against))
    return [
        with_ranking(row, ranking, rows, start, _moved(row, ranking, rows))
        for row, ranking in zip(rows, corrected_together(found), strict=True)
    ]


def _references(row: Row, rows: list[Row]) -> dict[Kind, int]:
    """Indices of a row's references.

    "dense" has the same model and quantization without pruning. "semantic" has no sensitivity and the same budget, in
    the same table.
    """
    if row.pruner == NONE:
        return {}
    found: dict[Kind, int] = {}
    for index, other in enumerate(rows):
        if (other.model, other.quantization) == (row.model, row.quantization):
            if other.pruner == NONE:
                found["dense"] = index
            elif other.sensitivity == NONE != row.sensitivity and (other.keep, other.run_id) == (row.keep, row.run_id):
                found["semantic"] = index
    return found


def _moved(row: Row, ranking: Ranking, rows: list[Row]) -> str:
    """The remark on a row whose count on UNTOUCHED differs from that of its dense reference; "" if none does.

    Pruning cannot change the answers in that column.
    """
    dense = ranking.get("dense")
    here, there = (r.cells.get(UNTOUCHED, Score()).k for r in (row, rows[dense.row] if dense else row))
    return "" if here == there or None in (here, there) else f"{here} right on {UNTOUCHED}, {there} without pruning"
