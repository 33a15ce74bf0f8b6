"""The registry of families and the small random functions that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from qapbench.tasks.diagramqa.draw import PALE, Canvas, Color
from qapbench.tasks.diagramqa.scene import Box, Question, Scene

T = TypeVar("T")
Rng = np.random.Generator
Make = Callable[[Rng, str], Scene]


@dataclass(frozen=True)
class Family:
    """A registered family: who makes its scenes, and what its questions are labelled with."""

    name: str
    make: Make
    subject: str
    modality: str
    grades: tuple[int, int]
    weight: float


FAMILIES: dict[str, Family] = {}


def family(
    name: str, subject: str, modality: str, grades: tuple[int, int], weight: float = 1.0
) -> Callable[[Make], Make]:
    """Register the decorated function. ``modality`` is "image" or "text", ``grades`` is inclusive."""

    def register(make: Make) -> Make:
        FAMILIES[name] = Family(name, make, subject, modality, grades, weight)
        return make

    return register


def pick(rng: Rng, options: Sequence[T]) -> T:
    """One of ``options``, uniformly."""
    return options[int(rng.integers(len(options)))]


def draw_some(rng: Rng, options: Sequence[T], k: int) -> list[T]:
    """``k`` different options in random order."""
    return [options[i] for i in rng.permutation(len(options))[:k]]


def listed(text: str, separator: str = " ") -> list[str]:
    """The words of a long list that is easier to read as one text."""
    return text.split(separator)


MASS = frozenset(
    listed("popcorn bacon cheese butter rice sushi honey chocolate garlic broccoli wheat lightning rain soap")
)


def an(name: str) -> str:
    """The name with its indefinite article, if it takes one."""
    if name in MASS:
        return name
    return ("an " if name[0] in "aeiou" else "a ") + name


def flip(rng: Rng, p: float = 0.5) -> bool:
    """True with probability ``p``."""
    return bool(rng.random() < p)


def pale(rng: Rng) -> Color:
    """A light background."""
    return pick(rng, PALE)


class Asker:
    """Collects the questions of one scene and turns them into a :class:`Scene`.

    The hint is the same for all questions of a scene and is kept with probability ``hint_rate``.
    """

    def __init__(self, rng: Rng, name: str, hints: Sequence[str] = (), hint_rate: float = 0.5) -> None:
        self.rng = rng
        self.family = FAMILIES[name]
        self.hint = pick(rng, hints) if hints and flip(rng, hint_rate) else ""
        low, high = self.family.grades
        self.grade = f"grade{int(rng.integers(low, high + 1))}"
        self.questions: list[Question] = []

    def ask(
        self,
        topic: str,
        templates: Sequence[str],
        answer: str,
        others: Sequence[str],
        relevant: Sequence[Box] = (),
        limit: int = 4,
    ) -> None:
        """Add one question; at most ``limit`` choices, in random order.

        ``others`` must be such that every subset with the answer is as likely for any answer in it,
        otherwise the choices alone would tell the answer.
        """
        wrong = [other for other in dict.fromkeys(others) if other != answer]
        choices = [answer, *draw_some(self.rng, wrong, limit - 1)]
        order = [int(i) for i in self.rng.permutation(len(choices))]
        self.questions.append(
            Question(
                question=pick(self.rng, templates),
                hint=self.hint,
                choices=[choices[i] for i in order],
                answer=order.index(0),
                family=self.family.name,
                subject=self.family.subject,
                grade=self.grade,
                topic=topic,
                relevant=list(relevant),
            )
        )

    def scene(self, split: str, canvas: Canvas | None = None, facts: Sequence[str] = (), keep: int = 6) -> Scene:
        """The finished scene with at most ``keep`` of its questions, in random order."""
        if canvas is None:
            return Scene(None, draw_some(self.rng, self.questions, keep), [], list(facts))
        if split == "heldout":
            canvas.decorate(self.rng)
        return Scene(canvas.image, draw_some(self.rng, self.questions, keep), canvas.things, list(facts))
