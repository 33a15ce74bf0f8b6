"""Ranks, references and flags of the page's rows."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qapbench import UserError
from qapbench.analysis.paired import Scored, read_scored
from qapbench.analysis.ranking import Against, Ranking, rankings
from qapbench.records.record import Record

from .rows import Row, Versus

REFERENCES = {"dense": "same quantizer, nothing pruned", "semantic": "same pruner and budget, without sensitivity"}
UNTOUCHED = "NO"
"""Column of the questions without context and so without image, which pruning cannot change."""


def scored_runs(records: Sequence[Record], runs: Path | None) -> list[Scored | None]:
    """What each record's folder holds of its questions; None where it holds nothing that can be read.

    The folder is the run's id below `runs`; the id is a record's word, so only a plain hexadecimal one is followed.
    """
    found: list[Scored | None] = []
    for record in records:
        scored = None
        if runs and re.fullmatch(r"[0-9a-f]{8,64}", record.run_id):
            with contextlib.suppress(UserError):
                scored = Scored(record, read_scored(runs / record.run_id).rows, runs / record.run_id)
        found.append(scored if scored and scored.columns else None)
    return found


def compared(rows: Sequence[Row], scored: Sequence[Scored | None]) -> list[Row]:
    """The runs' rows with rank, references and flag."""
    return [
        with_ranking(row, standing, rows, 0, _moved(index, standing, scored))
        for index, (row, standing) in enumerate(zip(rows, rankings(scored), strict=True))
    ]


def with_ranking(row: Row, standing: Ranking, rows: Sequence[Row], start: int, moved: str) -> Row:
    """The row with its standing among `rows`, the first of which is number `start` on the page."""
    against: dict[str, Versus] = {k: _versus(one, rows, start) for k, one in (standing.against or {}).items()}
    return replace(row, rank=standing.rank, among=standing.among, against=against, moved=moved)


def _versus(against: Against, rows: Sequence[Row], start: int) -> Versus:
    d = against.difference
    flips = (d.gained, d.lost) if against.paired else (None, None)
    name = rows[against.row].name
    return Versus(start + against.row, name, d.difference, d.low, d.high, d.p, d.q, *flips)


def _moved(index: int, standing: Ranking, scored: Sequence[Scored | None]) -> str:
    """What pruning changed among the questions that it cannot change; "" where nothing."""
    dense = standing.get("dense")
    here, there = scored[index], scored[dense.row] if dense else None
    if here is None or there is None:
        return ""
    asked = [question for question, metrics in here.rows.items() if UNTOUCHED in metrics]
    changed = sum(here.rows[q][UNTOUCHED] != there.rows.get(q, {}).get(UNTOUCHED) for q in asked)
    return f"{changed} of {len(asked)} questions without context differ from {there.name}" if changed else ""
