"""Parts of a task's questions whose scores are shown apart: those that need their image.

Many questions with an image can be answered without it: ScienceQA keeps most of its score. What pruning does to the
rest is seen only apart from them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qapbench.errors import UserError
from qapbench.records.intact import SPEC
from qapbench.records.parts import ColumnScore, TaskPart
from qapbench.records.record import Record, read_record
from qapbench.records.store import answers_of
from qapbench.records.tally import tally

from .paired import NEEDS_IMAGE, Scored, read_scored

MARK = b'"blank_images": true'  # in the spec of a run on blank images
RIGHT = 0.5  # least score of an answer that counts as right


class Strata:
    """Adds the column NEEDS_IMAGE to runs.

    It is the task's score on the questions with an image that the full-precision model answers wrongly when the image
    is blank.

    Args:
        runs: folder of the results, which holds the runs on blank images that `strata: needs_image` asks for.
    """

    def __init__(self, runs: Path) -> None:
        self._blank: dict[str, Path] = {}
        self._wrong: dict[str, set[str] | None] = {}
        self._asked: dict[str, set[str]] = {}
        found = [path.parent for path in runs.glob(f"*/{SPEC}") if MARK in path.read_bytes()]
        for folder in sorted(found):
            try:
                record = read_record(folder)
            except UserError:
                continue  # not finished, or damaged: there is no stratum to show
            self._blank[_key(record)] = folder

    def __bool__(self) -> bool:
        """Whether there is any run on blank images."""
        return bool(self._blank)

    def of(self, scored: Scored) -> Scored:
        """The run with the column, if it is known which questions of its task need their image."""
        if scored.parts:
            parts = {label: self.of(part) for label, part in scored.parts.items()}
            listed = [_rescored(part, parts[part.label].record) for part in scored.record.parts or ()]
            return replace(scored, parts=parts, record=scored.record.model_copy(update={"parts": listed}))
        name, needed = scored.score, self._needing(scored.record)
        if name is None or needed is None or not scored.rows.keys() <= self._asked[_key(scored.record)]:
            return scored
        rows = {
            question: {**row, NEEDS_IMAGE: row[name]} if question in needed and name in row else row
            for question, row in scored.rows.items()
        }
        return replace(scored, rows=rows, record=_with_column(scored.record, rows.values()))

    def records(self, records: Sequence[Record], runs: Path) -> list[Record]:
        """The records with the column, where the scores of their questions lie below `runs`."""
        if not self:
            return list(records)
        found = []
        for record in records:
            try:
                found.append(self.of(replace(read_scored(runs / record.run_id), record=record)).record)
            except UserError:
                found.append(record)  # what is damaged is told where it is read for itself
        return found

    def _needing(self, record: Record) -> set[str] | None:
        """Ids of the questions that need their image; None if no run on blank images answered the task."""
        key = _key(record)
        if key not in self._blank or record.asked_blank:
            return None
        if key not in self._wrong:
            self._wrong[key], self._asked[key] = _read(self._blank[key])
        return self._wrong[key]


def _read(folder: Path) -> tuple[set[str] | None, set[str]]:
    """The questions that a run on blank images answered wrongly although they have one, and all that it answered."""
    try:
        blank = read_scored(folder)
        with_image = {answer.id for answer in answers_of(folder).read() if answer.images}
    except (UserError, OSError):
        return None, set()
    scores = {question: row[blank.score] for question, row in blank.rows.items() if blank.score in row}
    return {q for q, score in scores.items() if q in with_image and score < RIGHT}, set(blank.rows)


def _key(record: Record) -> str:
    """What a run has in common with the run on blank images of its task: the model, and how what is asked."""
    spec = record.spec.get("task")
    task = spec if isinstance(spec, dict) else {}
    asked: list[Any] = [task.get(name) for name in ("answers", "prompt", "parser", "metric")]
    content = [record.fingerprints.get(name) for name in ("model", "data")]
    return json.dumps([content, asked, record.spec.get("seed")], default=str)


def _with_column(record: Record, rows: Iterable[dict[str, float]]) -> Record:
    """The record with the column NEEDS_IMAGE in front of its last one."""
    (column,) = tally(rows, [NEEDS_IMAGE]).to_json()["columns"]
    *first, last = record.scores.columns
    columns = [*first, ColumnScore.model_validate(column), last]
    return record.model_copy(update={"scores": record.scores.model_copy(update={"columns": columns})})


def _rescored(part: TaskPart, record: Record) -> TaskPart:
    return part.model_copy(update={"scores": record.scores})
