"""One multiple-choice question, asked outside of a run in the form in which a run asks it."""

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
from qapbench.tasking.text import unquoted


@dataclass(frozen=True)
class LetterQuestion:
    """A multiple-choice question with one image.

    Attributes:
        question: the question with its requests, as a run asks it.
        text: its text for a human reader.
        options: the letters of the options.
        ids: for each option, the token that spells it after the prompt.
        truth: the letter of the right option.
    """

    question: Question
    text: str
    options: list[str]
    ids: list[int]
    truth: str

    @property
    def id(self) -> str:
        """The question's id in the data."""
        return self.question.id

    @property
    def image(self) -> Image.Image:
        """The question's image, decoded."""
        return decoded(self.question.images[0])

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities of the options: logits [..., V] of the next token -> [..., options] float64 that sum to 1."""
        return logits[..., self.ids].double().softmax(dim=-1)

    def shares(self, outputs: Sequence[Sequence[Any]]) -> list[float]:
        """Probabilities of the options, from a run's outputs.

        Args:
            outputs: `[log-likelihood, is most likely]` for each option.
        """
        likelihoods = torch.tensor([output[0] for output in outputs], dtype=torch.float64)
        return likelihoods.softmax(dim=0).tolist()


def by_letter(spec: RunSpec) -> RunSpec:
    """The same run, answered by option letters, so that the probability of each option can be compared.

    Raises:
        UserError: the run has several tasks.
    """
    if spec.tasks:
        raise UserError(Problem("one task is studied at a time; choose it with --set task=NAME", ("task",)))
    return spec.model_copy(update={"task": spec.task.model_copy(update={"answers": "letter"})})


def image_questions(task: TaskOutline) -> list[str]:
    """Ids of the questions that have exactly one image."""
    return [name for doc, name in enumerate(task.ids) if len(task.images(doc)) == 1]


def check_question(task: TaskOutline, name: str) -> None:
    """Check that a question can be explained. This needs no model.

    Args:
        task: the task, answered by letters.
        name: id of the question.

    Raises:
        UserError: the task has no such question, the question does not have exactly one image, or its options have no
            letters.
    """
    if name not in task.ids:
        raise UserError(Problem(f"no question '{name}' in {task.name}; {nearest(name, task.ids)}", ("sample",)))
    doc = task.ids.index(name)
    if len(task.images(doc)) != 1:
        raise UserError(Problem(f"'{name}' has no image (or several); name a question with one", ("sample",)))
    if not task.letter or not task.docs[doc].get("letters"):
        raise UserError(Problem(f"{task.name} has no lettered options to compare", ("task",)))


def find_questions(session: Session, spec: RunSpec, names: Sequence[str]) -> list[LetterQuestion]:
    """The questions with these ids, in the order of the ids, as a run of the spec asks them.

    Raises:
        UserError: a question cannot be explained, or the tokenizer spells the letter of an option as several tokens.
    """
    task = session.task(spec)
    for name in names:
        check_question(task, name)
    by_id = {question.id: question for question in session.questions(spec)}
    continuations = ContinuationTokenizer(session.model(spec)[1])
    return [_letters(by_id[name], task, continuations) for name in names]


def _letters(question: Question, task: TaskOutline, continuations: ContinuationTokenizer) -> LetterQuestion:
    spelled = [continuations.spell(*instance.args[:2]) for instance in question.instances]
    if any(len(ids) != 1 for ids in spelled):
        raise UserError(Problem("the tokenizer spells an option's letter as several tokens", ("model",)))
    doc = task.docs[question.place[1]]
    text = unquoted(str(doc.get("text") or question.prompt).replace(MARK, "")).strip()
    return LetterQuestion(question, text, list(doc["letters"]), [ids[0] for ids in spelled], doc["letter"])
