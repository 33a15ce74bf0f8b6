"""What a generated scene consists of: an image, named things in it, questions and true sentences."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[int, int, int, int]


@dataclass
class Question:
    """One multiple-choice question; ``answer`` indexes ``choices``."""

    question: str
    hint: str
    choices: list[str]
    answer: int
    family: str
    subject: str
    grade: str
    topic: str
    relevant: list[Box] = field(default_factory=list)
    """Pixel boxes (x0, y0, x1, y1; x1 and y1 exclusive) that the answer depends on; empty without image."""


@dataclass
class Thing:
    """A named thing that was drawn, with its pixel box and what is true of it (slot -> value).

    The answer to most questions about the image is a value of one slot of one thing, so these are labels that
    a vision tower can be taught patch by patch.
    """

    name: str
    box: Box
    about: dict[str, str] = field(default_factory=dict)


@dataclass
class Scene:
    """One generated scene. ``facts`` are short sentences that are true of it (dense captions)."""

    image: Image.Image | None
    questions: list[Question]
    things: list[Thing] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
