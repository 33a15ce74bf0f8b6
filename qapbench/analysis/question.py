"""One multiple-choice question outside a run, as a run asks it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qapbench.errors import Problem, UserError, nearest
from qapbench.running.session import Session
from qapbench.spec.run_spec import RunSpec
from qapbench.tasking.images import decoded
from qapbench.tasking.lm import MARK
from qapbench.tasking.outline import TaskOutline
from qapbench.tasking.questions import ContinuationTokenizer, Question


@dataclass(frozen=True)
class LetterQuestion:
    """A multiple-choice question with one image.

    Attributes:
        question: as a run asks it.
        text: as a person reads it.
        options: the letters; ids: the token of each behind the prompt; truth: the right one.
    """

    question: Question
    text: str
    options: list[str]
    ids: list[int]
    truth: str

    @property
    def id(self) -> str:
        return self.question.id

    @property
    def image(self) -> Image.Image:
        return decoded(self.question.images[0])

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., V] logits of the next token -> [..., options] float64, summing to 1 over the options."""
        return logits[..., self.ids].double().softmax(dim=-1)

    def shares(self, outputs: Sequence[Sequence[Any]]) -> list[float]:
        """The same from a run's outputs, `[log-likelihood, is most likely]` for each option."""
        likelihoods = torch.tensor([output[0] for output in outputs], dtype=torch.float64)
        return likelihoods.softmax(dim=0).tolist()


def by_letter(spec: RunSpec) -> RunSpec:
    """The same run answered by letters: what is compared is the probability of each option."""
    return spec.model_copy(update={"task": spec.task.model_copy(update={"answers": "letter"})})


def image_questions(task: TaskOutline) -> list[str]:
    """Ids of the questions that have one image."""
    return [name for doc, name in enumerate(task.ids) if len(task.images(doc)) == 1]


def check_question(task: TaskOutline, name: str) -> None:
    """Raise UserError where there is no question of that id, or it cannot be shown; no model is needed for that."""
    if name not in task.ids:
        raise UserError(Problem(f"no question '{name}' in {task.name}; {nearest(name, task.ids)}", ("sample",)))
    doc = task.ids.index(name)
    if len(task.images(doc)) != 1:
        raise UserError(Problem(f"'{name}' has no image (or several); name a question with one", ("sample",)))
    if not task.letter or not task.docs[doc].get("letters"):
        raise UserError(Problem(f"{task.name} has no lettered options to compare", ("task",)))


def find_questions(session: Session, spec: RunSpec, names: Sequence[str]) -> list[LetterQuestion]:
    """The questions of those ids, in their order, as a run of the spec asks them.

    Raises:
        UserError: one cannot be shown, or the tokenizer spells an option's letter as several tokens.
    """
    task = session.task(spec)
    for name in names:
        check_question(task, name)
    by_id = {question.id: question for question in session.questions(spec)}
    continuations = ContinuationTokenizer(session.model(spec)[1].tokenizer)
    return [_letters(by_id[name], task, continuations) for name in names]


def _letters(question: Question, task: TaskOutline, continuations: ContinuationTokenizer) -> LetterQuestion:
    spelled = [continuations.spell(*instance.args[:2]) for instance in question.instances]
    if any(len(ids) != 1 for ids in spelled):
        raise UserError(Problem("the tokenizer spells an option's letter as several tokens", ("model",)))
    doc = task.docs[question.place[1]]
    text = str(doc.get("text") or question.prompt).replace(MARK, "").strip()
    return LetterQuestion(question, text, list(doc["letters"]), [ids[0] for ids in spelled], doc["letter"])
