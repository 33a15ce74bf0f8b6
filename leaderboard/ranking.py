"""Adds ranks, references and remarks to the page's rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qapbench import UserError
from qapbench.analysis.paired import Scored, read_scored
from qapbench.analysis.ranking import Against, Ranking, rankings
from qapbench.records.answer import ScoredQuestion
from qapbench.records.record import Record

from .rows import Row, Versus

REFERENCES = {"dense": "same quantizer, nothing pruned", "semantic": "same pruner and budget, without sensitivity"}
UNTOUCHED = "NO"
"""Column of the questions without context, hence without an image, whose answers pruning cannot change."""


def scored_runs(records: Sequence[Record], runs: Path | None, damaged: list[str]) -> list[Scored | None]:
    """The scores of each record's questions, from the run's folder; None if they cannot be read.

    The folder is named by the run's id, which a record could set to any path, so only hexadecimal ids are followed.

    Args:
        records: the records.
        runs: folder of the runs; None reads nothing.
        damaged: list to which a sentence is added for each run whose files are damaged.
    """
    found: list[Scored | None] = []
    shared: dict[str, ScoredQuestion] = {}
    for record in records:
        scored = None
        folder = runs / record.run_id if runs and re.fullmatch(r"[0-9a-f]{8,64}", record.run_id) else None
        if folder and folder.is_dir():
            try:
                scored = read_scored(folder, shared, record)
                damaged += [f"{record.name}: {scored.damage}"] if scored.damage else []
            except UserError as error:
                damaged.append(f"{record.name}: no rank and no comparison; {error}")
        found.append(scored if scored and (scored.columns or scored.parts) else None)
    return found


def compared(rows: Sequence[Row], scored: Sequence[Scored | None]) -> list[Row]:
    """The runs' rows with ranks, references and remarks.

    Args:
        rows: one row per run.
        scored: scores of each run; None if they cannot be read.
    """
    return [
        with_ranking(row, ranking, rows, 0, moved(index, ranking, scored))
        for index, (row, ranking) in enumerate(zip(rows, rankings(scored), strict=True))
    ]


def with_ranking(row: Row, ranking: Ranking, rows: Sequence[Row], start: int, moved: str) -> Row:
    """The row with its ranking.

    Args:
        row: the row.
        ranking: its ranking among `rows`.
        rows: all rows that were ranked together.
        start: index on the page of the first of them.
        moved: remark on answers that pruning cannot change, but that changed; "" if there are none.
    """
    against: dict[str, Versus] = {k: versus(one, rows, start) for k, one in (ranking.against or {}).items()}
    rank, among, left_out = ranking.rank, ranking.among, ranking.left_out
    return replace(row, rank=rank, among=among, left_out=left_out, against=against, moved=moved)


def versus(against: Against, rows: Sequence[Row], start: int) -> Versus:
    """A comparison with a reference, as the page shows it.

    Args:
        against: the comparison.
        rows: all rows that were compared together.
        start: index on the page of the first of them.
    """
    d = against.difference
    flips = (d.gained, d.lost) if against.paired else (None, None)
    name = rows[against.row].name
    return Versus(start + against.row, name, d.difference, d.low, d.high, d.p, d.q, *flips)


def moved(index: int, ranking: Ranking, scored: Sequence[Scored | None]) -> str:
    """The remark on answers that changed although pruning cannot change them; "" if there are none.

    Args:
        index: index of the row.
        ranking: its ranking.
        scored: scores of each row's run of one task; None if they cannot be read.
    """
    dense = ranking.get("dense")
    here, there = scored[index], scored[dense.row] if dense else None
    if here is None or there is None:
        return ""
    asked = [question for question, metrics in here.rows.items() if UNTOUCHED in metrics]
    changed = sum(here.rows[q][UNTOUCHED] != there.rows.get(q, {}).get(UNTOUCHED) for q in asked)
    return f"{changed} of {len(asked)} questions without context differ from {there.name}" if changed else ""
