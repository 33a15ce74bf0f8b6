"""Rows of a page whose scores stand under their tasks: some run asked several, or one with a score of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qapbench.analysis.paired import Scored
from qapbench.analysis.ranking import rankings_by_task
from qapbench.analysis.relative import parts_of, relative_averages, score_of
from qapbench.records.parts import TaskPart
from qapbench.records.record import Record

from .paper import OVERALL
from .ranking import moved, versus
from .rows import Row, Score, Standing, Versus, confidence_cells, score_of_column

PAPER = "scienceqa"
"""The task of the paper's rows."""


def task_labels(records: Sequence[Record]) -> list[str]:
    """Labels of the tasks, in the order of the rows.

    There are none if every run asked a single task whose columns are those of the paper's rows.
    """
    if not any(record.parts or _has_own_score(record) for record in records):
        return []
    return list(dict.fromkeys(part.label for record in records for part in parts_of(record)))


def _has_own_score(record: Record) -> bool:
    """Whether a run's task names a score that is not the overall column of the paper's rows."""
    return bool(record.task and record.task.score not in (None, OVERALL))


def detail_name(label: str, column: str) -> str:
    """Name on the page of a column of a task that is not its score."""
    return f"{label} · {column}"


@dataclass(frozen=True)
class TaskColumns:
    """The columns of a task beside its score, by their names on the page.

    Attributes:
        stratum: that of the questions that need their image; None if no row has it.
        details: all others.
    """

    stratum: str | None
    details: list[str]

    def __len__(self) -> int:
        return len(self.details)


def columns_by_task(labels: Sequence[str], columns: Sequence[str], stratum: str) -> dict[str, TaskColumns]:
    """The columns of each task.

    Args:
        labels: labels of the tasks.
        columns: names of all columns of the page.
        stratum: name of the column of the questions that need their image.
    """
    found = {}
    for label in labels:
        own = detail_name(label, stratum)
        details = [name for name in columns if name.startswith(detail_name(label, "")) and name != own]
        found[label] = TaskColumns(own if own in columns else None, details)
    return found


def rows_by_task(rows: Sequence[Row], records: Sequence[Record], scored: Sequence[Scored | None]) -> list[Row]:
    """The rows with their scores under their tasks, compared with others task by task, and their relative averages.

    Args:
        rows: one row per record.
        records: the records.
        scored: scores of each run; None if they cannot be read.
    """
    runs = [run.tasks if run else {} for run in scored]
    rankings = rankings_by_task(runs)
    found = []
    for index, (row, record, share) in enumerate(zip(rows, records, relative_averages(records), strict=True)):
        cells: dict[str, Score] = {}
        standings: dict[str, Standing] = {}
        remarks: list[str] = []
        for part in parts_of(record):
            cells |= _cells(part)
            if part.label in rankings:
                ranking = rankings[part.label][index]
                against: dict[str, Versus] = {k: versus(one, rows, 0) for k, one in (ranking.against or {}).items()}
                standings[part.label] = Standing(ranking.rank, ranking.among, against)
                remark = moved(index, ranking, [tasks.get(part.label) for tasks in runs])
                remarks += [f"{part.label}: {remark}"] if remark else []
        relative = Score(accuracy=share.average, reason=share.reason)
        told = "; ".join(remarks)
        found.append(replace(row, cells=cells, by_task=standings, relative=relative, moved=told))
    return found


def paper_row_by_task(row: Row, labels: Sequence[str], overall: str) -> Row:
    """A row of the paper with its scores under their task; without any, if no run on the page asked it.

    Args:
        row: the row.
        labels: the tasks on the page.
        overall: name of the column that is the score.
    """
    missing = Score(reason="the paper does not state it")
    if PAPER not in labels:
        return replace(row, cells={}, rank=None, against={}, moved="", relative=missing)
    cells = {PAPER if name == overall else detail_name(PAPER, name): score for name, score in row.cells.items()}
    standing = {PAPER: Standing(row.rank, row.among, row.against)}
    ordered = {PAPER: cells.pop(PAPER), **cells}
    return replace(row, cells=ordered, by_task=standing, rank=None, against={}, relative=missing)


def _cells(part: TaskPart) -> Mapping[str, Score]:
    """The scores of a task: its score under the task's label, then every other column."""
    own = score_of(part)
    if own is None:
        return {part.label: Score(reason="the record holds no result")}
    details = {column.name: score_of_column(column) for column in part.scores.columns if column.name != own.name}
    details |= confidence_cells(part.scores)
    return {part.label: score_of_column(own), **{detail_name(part.label, name): one for name, one in details.items()}}
