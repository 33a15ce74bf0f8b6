"""Questions whose answers a row changed, with the image and the tokens that both runs kept, as in QAPruner's Figure 1.

Everything is read when the page is built: the answers from the runs' folders, and the questions and images from the
data that the record names, if they are on this machine and unchanged. The page says what is missing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from qapbench import UserError
from qapbench.analysis.paired import Scored, flipped
from qapbench.analysis.pictures import data_uri, grid_of, image_processor_config, seen_image
from qapbench.checkpoints.find import find_checkpoint
from qapbench.receipt import ImageTokens
from qapbench.records.answer import Answer
from qapbench.records.record import Record
from qapbench.spec.task_spec import TaskSpec
from qapbench.tasking.images import decoded
from qapbench.tasking.outline import TaskOutline, read_outline
from qapbench.tasking.registry import runs_only_own_code

from .rows import Row, mapping, sequence, text

EACH = 3  # largest number of a row's flips that are shown in each direction
QUESTIONS = 60  # largest number of different questions on a page, whose images make up most of its size
SHOWN = "semantic", "dense"  # a row's flips are shown against the first of these references that it has


@dataclass(frozen=True, eq=False)
class _Pair:
    """A run beside its reference, in one task.

    Attributes:
        task: label of the task; "" on a page of a single task.
        first: the reference.
        second: the run.
        column: the column whose scores are compared.
    """

    task: str
    first: Scored
    second: Scored
    column: str

    def directions(self) -> dict[str, list[str]]:
        """Ids of the questions that score higher than in the reference, and of those that score lower."""
        gained, lost = flipped(self.first, self.second, self.column)
        return {"gained": gained, "lost": lost}

    def counts_right(self) -> bool:
        """Whether every score is 0 or 1, so that a flip is a right answer that became a wrong one or the reverse."""
        columns = [column for run in (self.first, self.second) for column in run.record.scores.columns]
        return all(column.k is not None for column in columns if column.name == self.column)


@dataclass
class Flips:
    """The flips that the page shows.

    Attributes:
        rows: index of a row -> its flips, for each of its tasks: the label of the task ("" on a page of a single task),
            the reference's name, whether every score is 0 or 1, counts, and up to EACH questions in both directions.
        questions: key of a question -> its texts and image; `image` is a data URI.
        missing: why some flips are not shown.
    """

    rows: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    questions: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def find_flips(rows: Sequence[Row], scored: Sequence[Scored | None]) -> Flips:
    """The flips of every row that has a reference, as many as the page has room for.

    Args:
        rows: the rows.
        scored: scores of each row's run; None if they cannot be read.
    """
    found = Flips()
    pairs = {
        index: found_pairs for index, row in enumerate(rows) if (found_pairs := _pairs(row, scored[index], scored))
    }
    if not pairs:
        return found
    sources = _Sources(found.missing)
    flips = {pair: pair.directions() for several in pairs.values() for pair in several}
    often = Counter(
        (pair.second.record.fingerprints.get("data"), q)
        for pair, directions in flips.items()
        for ids in directions.values()
        for q in ids
    )
    wanted: defaultdict[str, set[str]] = defaultdict(set)  # run id -> questions whose answers are drawn
    drawn: dict[_Pair, dict[str, list[tuple[str, str]]]] = {}
    for pair, directions in flips.items():
        data = pair.second.record.fingerprints.get("data")
        drawn[pair] = {}
        for direction, ids in directions.items():
            # Questions with images come first, then those that many rows flip, since the page holds each only once.
            ids.sort(key=lambda q: (not sources.has_image(pair.second, q), -often[data, q], q))
            shown = [(question, sources.add(pair.second, question, found.questions)) for question in ids[:EACH]]
            drawn[pair][direction] = [(question, key) for question, key in shown if key]
            for run in (pair.first, pair.second):
                wanted[run.record.run_id] |= {question for question, _ in drawn[pair][direction]}
    runs = {run.record.run_id: run for pair in flips for run in (pair.first, pair.second)}
    answers = {run_id: runs[run_id].answers(questions) for run_id, questions in wanted.items()}
    for index, several in pairs.items():
        found.rows[index] = [
            {
                "task": pair.task,
                "against": pair.first.name,
                "counts_right": pair.counts_right(),
                **{
                    direction: {
                        "count": len(ids),
                        "shown": [_card(pair, q, key, answers, found.questions) for q, key in drawn[pair][direction]],
                    }
                    for direction, ids in flips[pair].items()
                },
            }
            for pair in several
        ]
    return found


def _pairs(row: Row, second: Scored | None, scored: Sequence[Scored | None]) -> list[_Pair]:
    """A row's run beside its reference, in each task in which it has one."""
    if second is None:
        return []
    standings = {label: one.against for label, one in row.by_task.items()} or {"": row.against}
    found = []
    for label, references in standings.items():
        against = next((references[kind] for kind in SHOWN if kind in references), None)
        first = scored[against.row] if against else None
        if first is None:
            continue
        one, other = (run.tasks.get(label) if label else run for run in (first, second))
        if one and other and (column := other.score) is not None:
            found.append(_Pair(label, one, other, column))
    return found


def _card(
    pair: _Pair, question: str, key: str, answers: Mapping[str, Mapping[str, Answer]], questions: Mapping[str, Any]
) -> dict[str, Any]:
    """A flipped question with what both runs answered."""
    sides = [
        _side(answers[run.record.run_id].get(question), run.rows[question][pair.column], questions[key]["square"])
        for run in (pair.first, pair.second)
    ]
    return {"question": key, "sides": sides}


def _side(answer: Answer | None, score: float, square: bool) -> dict[str, Any]:
    """One run's answer to a question: its text, and the tokens that it kept of the first image; null if it kept all.

    Args:
        answer: the stored answer; None if there is none.
        score: its score.
        square: whether the image is square. Only then is the grid of its tokens known.
    """
    image = answer.images[0] if answer and answer.images else ImageTokens(available=0)
    available = image.available if image.available <= 1 << 16 else 0
    valid = image.kept is not None and all(0 <= place < available for place in image.kept)
    return {
        "answer": answer.answer if answer else "",
        "score": score,
        "grid": grid_of(available) if square else None,
        "kept": image.kept if valid else None,
        "merged": image.merged,
    }


class _Sources:
    """Reads questions and images of the tasks that records name, each task once.

    Args:
        missing: list to which reasons for missing questions are added, each once.
    """

    def __init__(self, missing: list[str]) -> None:
        self._missing = missing
        self._tasks: dict[str, tuple[TaskOutline, dict[str, int]] | None] = {}
        self._names: dict[int, str] = {}  # by the identity of a record: a record is asked about for each of its flips
        self._processors: dict[str, dict[str, Any] | None] = {}

    def has_image(self, run: Scored, question: str) -> bool:
        """Whether a question has an image; False if its task is not available.

        Args:
            run: a run that answered it.
            question: its id.
        """
        source = self._task(run.record)
        return source is not None and question in source[1] and bool(source[0].images(source[1][question]))

    def add(self, run: Scored, question: str, questions: dict[str, dict[str, Any]]) -> str | None:
        """Add a question, unless it is there already or the page is full.

        Args:
            run: a run that answered it.
            question: its id.
            questions: where it is added.

        Returns:
            Its key in `questions`; None if it cannot be shown.
        """
        data = str(run.record.fingerprints.get("data"))
        key = f"{data[:16]} {question}"
        if key in questions:
            return key
        source = self._task(run.record)
        if source is None or question not in source[1]:
            return None
        if len(questions) >= QUESTIONS:
            self._miss(f"more than {QUESTIONS} different questions; the rest of the flips is in `qapbench compare`")
            return None
        task, places = source
        doc = task.docs[places[question]]
        shown: dict[str, Any] = {"id": question, "image": None, "square": False}
        shown["text"] = text(doc.get("question") or doc.get("text"))
        shown["hint"] = text(doc.get("hint"))
        shown["choices"] = [text(choice) for choice in sequence(doc.get("choices"))]
        shown["truth"] = text(doc.get("letter"))
        if doc.get("image") is not None:
            try:
                image = decoded(*task.shown([doc["image"]]))
                picture = seen_image(image, self._processor(text(run.record.spec.get("model"))))
                shown["image"], shown["square"] = data_uri(picture), picture.width == picture.height
            except UserError as error:
                self._miss(f"an image cannot be read: {error}")
        questions[key] = shown
        return key

    def _task(self, record: Record) -> tuple[TaskOutline, dict[str, int]] | None:
        """The outline of a record's task, and the index of each question by its id; None if they are not available."""
        if (known := self._names.get(id(record))) is not None:
            return self._tasks[known]
        spec, data = mapping(record.spec.get("task")), record.fingerprints.get("data")
        name = self._names[id(record)] = str([spec, data])
        if name not in self._tasks:
            self._tasks[name] = None
            try:
                asked = TaskSpec.model_validate(spec)
                # A record may come from a stranger: only this project's own tasks run no other code and fetch nothing.
                if not runs_only_own_code(asked) or (asked.data and not Path(str(asked.data)).is_file()):
                    raise UserError("they are not on this machine")
                task = read_outline(asked)
                pa.default_memory_pool().release_unused()  # by itself, Arrow keeps what reading the images took
                if task.fingerprint != data:
                    raise UserError("the file on this machine holds others")
                self._tasks[name] = task, {question: place for place, question in enumerate(task.ids)}
            except (UserError, ValidationError) as error:
                why = str(error) if isinstance(error, UserError) else "the record's task is not a valid one"
                self._miss(f"questions of {text(spec.get('name'))}: {why}")
        return self._tasks[name]

    def _processor(self, model: str) -> dict[str, Any] | None:
        """Config of the model's image processor; None if it is not on this machine, which takes the centre square."""
        if model not in self._processors:
            self._processors[model] = None
            try:
                self._processors[model] = image_processor_config(find_checkpoint(model, fetch=False).folder)
            except UserError:  # the image is drawn without the config
                self._miss(f"the image processor of {model}: images are drawn as their centre square")
        return self._processors[model]

    def _miss(self, what: str) -> None:
        """Note a reason for something missing, once."""
        if what not in self._missing:
            self._missing.append(what)
