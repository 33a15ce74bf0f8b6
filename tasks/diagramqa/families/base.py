"""The registry of families, and helpers that all families share."""

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
    """A registered family of questions.

    Attributes:
        name: name of the family.
        make: function of (random generator, split) that makes a scene.
        subject: subject in the sense of ScienceQA, such as "natural science".
        modality: "image" if its questions have an image, else "text".
        grades: lowest and highest school grade, both included.
        weight: how often the family is drawn, relative to other families of the same modality.
    """

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
    """Return a decorator that registers a function as the `make` of a family. `Family` explains the arguments."""

    def register(make: Make) -> Make:
        FAMILIES[name] = Family(name, make, subject, modality, grades, weight)
        return make

    return register


def pick(rng: Rng, options: Sequence[T]) -> T:
    """Draw one of `options`, each with equal probability."""
    return options[int(rng.integers(len(options)))]


def draw_some(rng: Rng, options: Sequence[T], k: int) -> list[T]:
    """Draw `k` different options, in random order. All options are drawn if there are fewer."""
    return [options[i] for i in rng.permutation(len(options))[:k]]


def listed(text: str, separator: str = " ") -> list[str]:
    """Split a text into a list. Long lists of words are easier to read as one text."""
    return text.split(separator)


MASS = frozenset(
    listed("popcorn bacon cheese butter rice sushi honey chocolate garlic broccoli wheat lightning rain soap")
)


def an(name: str) -> str:
    """Put the indefinite article in front of `name`, unless the name is in MASS and takes none."""
    if name in MASS:
        return name
    return ("an " if name[0] in "aeiou" else "a ") + name


def flip(rng: Rng, p: float = 0.5) -> bool:
    """Return True with probability `p`."""
    return bool(rng.random() < p)


def pale(rng: Rng) -> Color:
    """Draw a light colour for the background."""
    return pick(rng, PALE)


class Asker:
    """Collects the questions of one scene and turns them into a `Scene`.

    All questions of a scene have the same school grade and the same hint.

    Args:
        rng: random generator of the scene.
        name: name of the family.
        hints: hints of which one is drawn.
        hint_rate: probability that the scene has a hint at all.
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
        """Add one question, with its choices in random order.

        The choices alone must not tell the answer. `others` must therefore be such that any given set of choices is
        equally likely to occur, whichever of them is the answer.

        Args:
            topic: topic of the question.
            templates: wordings of the question, of which one is drawn.
            answer: the right choice.
            others: the choices that wrong ones are drawn from; may contain the answer and duplicates.
            relevant: boxes in pixels that the answer depends on.
            limit: largest number of choices.
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
        """Finish the scene.

        Args:
            split: name of the split; in the split "heldout", a distractor is added to the image.
            canvas: what was drawn; None for a scene without an image.
            facts: sentences that are true of the scene.
            keep: largest number of questions to keep. They are drawn at random and put in random order.
        """
        if canvas is None:
            return Scene(None, draw_some(self.rng, self.questions, keep), [], list(facts))
        if split == "heldout":
            canvas.decorate(self.rng)
        return Scene(canvas.image, draw_some(self.rng, self.questions, keep), canvas.things, list(facts))
