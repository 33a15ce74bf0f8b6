"""Questions whose answer a row changed, with the image and the tokens that both kept, as in QAPruner's Figure 1.

Everything is read when the page is built: the answers from the runs' folders, the questions and images from the data
that the record names, where these are here and are the same. What is not here is said on the page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qapbench import UserError
from qapbench.analysis.paired import OVERALL, Scored, flipped
from qapbench.analysis.pictures import data_uri, grid_of, image_processor_config, seen_image
from qapbench.checkpoints.find import find_checkpoint
from qapbench.receipt import ImageTokens
from qapbench.records.answer import Answer
from qapbench.records.record import Record
from qapbench.spec.run_spec import TaskSpec
from qapbench.tasking.outline import TaskOutline, read_outline
from qapbench.tasking.registry import own_tasks

from .rows import Row, mapping, sequence, text

EACH = 3  # flips of a row that are drawn, in each direction
QUESTIONS = 60  # different questions on a page: their images are what it weighs
SHOWN = "semantic", "dense"  # the reference that a row's flips are drawn against: the first that it has


@dataclass
class Flips:
    """What the page draws.

    Attributes:
        rows: place of a row -> its flips: the reference's name, counts, and up to EACH in both directions.
        questions: what is asked, by data and id; `image` is a data URI.
        missing: why something is not drawn.
    """

    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    questions: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def find_flips(rows: Sequence[Row], scored: Sequence[Scored | None]) -> Flips:
    """The flips of every row that has a reference, within the page's bounds."""
    found = Flips()
    pairs: dict[int, tuple[Scored, Scored, dict[str, list[str]]]] = {}
    for index, row in enumerate(rows):
        against = next((row.against[kind] for kind in SHOWN if kind in row.against), None)
        one, other = (scored[against.row], scored[index]) if against else (None, None)
        if one and other:
            gained, lost = flipped(one, other, other.columns[OVERALL])
            pairs[index] = one, other, {"gained": gained, "lost": lost}
    if not pairs:
        return found
    sources = _Sources(found.missing)
    often = Counter(q for _, _, directions in pairs.values() for ids in directions.values() for q in ids)
    stored: dict[str, dict[str, Answer]] = {}
    for index, (one, other, directions) in pairs.items():
        answers = [stored.setdefault(run.record.run_id, run.answers()) for run in (one, other)]
        drawn: dict[str, Any] = {"against": one.name}
        for direction, ids in directions.items():
            # Images first, then what many rows flip: its image is on the page once.
            ids = sorted(ids, key=lambda q: (not _images(answers[1], q), -often[q], q))
            drawn[direction] = {"count": len(ids), "shown": []}
            for question in ids[:EACH]:
                key = sources.add(other, question, found.questions)
                if key:
                    sides = [_side(side.get(question), found.questions[key]["square"]) for side in answers]
                    drawn[direction]["shown"].append({"question": key, "sides": sides})
        found.rows[index] = drawn
    return found


def _images(answers: dict[str, Answer], question: str) -> list[ImageTokens]:
    answer = answers.get(question)
    return (answer.images if answer else None) or []


def _side(answer: Answer | None, square: bool) -> dict[str, Any]:
    """One run's answer to a question: its text and which tokens of the (first) image it kept; null for all.

    Args:
        square: whether the image is; only then is the grid of its tokens known.
    """
    image = answer.images[0] if answer and answer.images else ImageTokens(available=0)
    available = image.available if image.available <= 1 << 16 else 0
    valid = image.kept is not None and all(0 <= place < available for place in image.kept)
    return {
        "answer": answer.answer if answer else "",
        "grid": grid_of(available) if square else None,
        "kept": image.kept if valid else None,
        "merged": image.merged,
    }


class _Sources:
    """Questions and images of the tasks that records name, each read once. Says what is missing, once."""

    def __init__(self, missing: list[str]) -> None:
        self._missing = missing
        self._tasks: dict[str, tuple[TaskOutline, dict[str, int]] | None] = {}
        self._processors: dict[str, dict[str, Any] | None] = {}

    def add(self, run: Scored, question: str, questions: dict[str, dict[str, Any]]) -> str | None:
        """The question's key in `questions`, put there where there is room; None where it cannot be shown."""
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
                picture = seen_image(doc["image"].load(), self._processor(text(run.record.spec.get("model"))))
                shown["image"], shown["square"] = data_uri(picture), picture.width == picture.height
            except UserError as error:
                self._miss(f"an image cannot be read: {error}")
        questions[key] = shown
        return key

    def _task(self, record: Record) -> tuple[TaskOutline, dict[str, int]] | None:
        spec, data = mapping(record.spec.get("task")), record.fingerprints.get("data")
        name = str([spec, data])
        if name not in self._tasks:
            self._tasks[name] = None
            try:
                asked = TaskSpec.model_validate(spec)
                # Only the project's own tasks: another's could run its code or fetch, for what a stranger wrote.
                if asked.name not in own_tasks() or (asked.data and not Path(asked.data).is_file()):
                    raise UserError("they are not on this machine")
                task = read_outline(asked)
                if task.fingerprint != data:
                    raise UserError("the file on this machine holds others")
                self._tasks[name] = task, {question: place for place, question in enumerate(task.ids)}
            except (UserError, ValidationError) as error:
                why = str(error) if isinstance(error, UserError) else "the record's task is not a valid one"
                self._miss(f"questions of {text(spec.get('name'))}: {why}")
        return self._tasks[name]

    def _processor(self, model: str) -> dict[str, Any] | None:
        """The config of the model's image processor where it is on this machine; None takes the centre square."""
        if model not in self._processors:
            self._processors[model] = None
            try:
                self._processors[model] = image_processor_config(find_checkpoint(model, fetch=False).folder)
            except (UserError, OSError, ValueError, KeyError):  # the picture is drawn without it
                self._miss(f"the image processor of {model}: images are drawn as their centre square")
        return self._processors[model]

    def _miss(self, what: str) -> None:
        if what not in self._missing:
            self._missing.append(what)
