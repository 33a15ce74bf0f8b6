"""The parts of a generated scene: an image, the named things in it, questions about it, and true sentences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[int, int, int, int]


@dataclass
class Question:
    """One multiple-choice question.

    Attributes:
        question: the text of the question.
        hint: a text that is shown with the question; "" if there is none.
        choices: the texts of the options.
        answer: index of the right option in `choices`.
        family: name of the family that made the question.
        subject: subject in the sense of ScienceQA, such as "natural science".
        grade: school grade, such as "grade3".
        topic: what the question is about; finer than the family.
    """

    question: str
    hint: str
    choices: list[str]
    answer: int
    family: str
    subject: str
    grade: str
    topic: str
    relevant: list[Box] = field(default_factory=list)
    """Boxes (x0, y0, x1, y1) in pixels, x1 and y1 exclusive, that the answer depends on; empty without an image."""


@dataclass
class Thing:
    """A named thing that was drawn.

    The answer to most questions about an image is one value in `about` of one thing. A vision tower can therefore be
    trained with these values as labels of patches.

    Attributes:
        name: name of the thing.
        box: its box (x0, y0, x1, y1) in pixels, x1 and y1 exclusive.
        about: what is true of the thing, as values by slot, such as {"color": "red"}.
    """

    name: str
    box: Box
    about: dict[str, str] = field(default_factory=dict)


@dataclass
class Scene:
    """One generated scene.

    Attributes:
        image: the RGB image, or None for a scene with text-only questions.
        questions: the questions about the scene.
        things: the things drawn in the image.
        facts: short sentences that are true of the scene; together they serve as a dense caption.
    """

    image: Image.Image | None
    questions: list[Question]
    things: list[Thing] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
