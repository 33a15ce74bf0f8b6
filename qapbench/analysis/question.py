"""One question put to a model outside a run: its prompt, its options, and what a strategy would look at."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qapbench.compress import joint_space
from qapbench.errors import Problem, UserError, nearest
from qapbench.models import family_of
from qapbench.models.relevance import QuestionReader
from qapbench.receipt import Receipt
from qapbench.run.lm import MARK, content_items
from qapbench.run.questions import Speller, decoded
from qapbench.run.tasks import LoadedTask
from qapbench.spec import PruneSpec, RunSpec
from qapbench.strategy import fusions, metrics, min_max, pruners
from qapbench.tokens import Selection, VisionTokens


@dataclass(frozen=True)
class Question:
    """A multiple-choice question with one image.

    Attributes:
        id: the data's own.
        text: as a person reads it; prompt: as the model gets it.
        relevance_text: what relevance compares the image with.
        options: the letters; ids: the token of each behind the prompt; truth: the right one.
    """

    id: str
    text: str
    prompt: str
    relevance_text: str
    image: Image.Image
    options: list[str]
    ids: list[int]
    truth: str

    def inputs(self, processor: Any, device: torch.device) -> dict[str, Any]:
        made = processor(text=[self.prompt], images=[self.image], return_tensors="pt")
        return {key: value.to(device) for key, value in made.items()}

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., V] logits of the next token -> [..., options] float64, summing to 1 over the options."""
        return logits[..., self.ids].double().softmax(dim=-1)


def find_question(task: LoadedTask, processor: Any, name: str) -> Question:
    """The question with that id.

    Raises:
        UserError: there is none, or it has no image or no options.
    """
    if name not in task.ids:
        raise UserError(Problem(f"no question '{name}' in {task.name}; {nearest(name, task.ids)}", ("sample",)))
    doc = task.docs[task.ids.index(name)]
    if len(task.task.doc_to_image(doc) or []) != 1:
        raise UserError(Problem(f"'{name}' has no image (or several); name a question with one", ("sample",)))
    return _question(task, processor, name, doc)


def image_questions(task: LoadedTask) -> list[str]:
    """Ids of the questions that have one image."""
    pairs = zip(task.ids, task.docs, strict=False)
    return [name for name, doc in pairs if len(task.task.doc_to_image(doc) or []) == 1]


def _question(task: LoadedTask, processor: Any, name: str, doc: Any) -> Question:
    options, truth = doc.get("letters"), doc.get("letter")
    if not options or truth is None:
        raise UserError(Problem(f"{task.name} has no lettered options to compare", ("task",)))
    text = task.task.doc_to_text(doc)
    if getattr(processor, "chat_template", None):
        turn = {"role": "user", "content": content_items(text)}
        prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    else:
        prompt = text.replace(MARK, processor.image_token)
    (image,) = task.task.doc_to_image(doc)
    read = text.replace(MARK, "").strip()
    speller = Speller(processor.tokenizer)
    ids = [speller.spell(prompt, option) for option in options]
    if any(len(spelled) != 1 for spelled in ids):
        raise UserError(Problem("the tokenizer spells an option's letter as several tokens", ("model",)))
    return Question(
        name,
        read,
        prompt,
        doc.get("relevance_text") or read,
        decoded(image),
        list(options),
        [spelled[0] for spelled in ids],
        truth,
    )


@dataclass(frozen=True)
class Look:
    """What one pruning sees in one image, each score [N] in [0, 1], and what it keeps."""

    relevance: Tensor | None
    sensitivity: Tensor | None
    selection: Selection
    grid: tuple[int, int] | None


class Looker:
    """Shows a question's image to prunings, without running the language model.

    The model is used as it is: inside `compress` the vision side is quantized where the spec says so.
    """

    def __init__(self, model: Any, processor: Any, spec: RunSpec) -> None:
        self.family = family_of(model)
        self.processor = processor
        self.spec = spec
        self.receipt = Receipt()  # of fallbacks alone

    def tokens(self, question: Question, prune: PruneSpec) -> VisionTokens:
        """Everything that the pruner reads about the question and its image: a batch of one."""
        pruner = pruners.create(prune.method.name, **prune.method.params)
        reader = QuestionReader(pruner.needs, self._tower(pruner.needs), self.family.model.get_input_embeddings())
        inputs = question.inputs(self.processor, self.family.model.device)
        tokens = self.family.look(inputs, (pruner.needs & self.family.offers) | reader.visual).single
        if not reader.needs:
            return tokens
        ids = inputs["input_ids"][0]
        asked: dict[str, Any] = reader.fields(tokens, question.relevance_text, ids[ids != self.family.image_token])
        return dataclasses.replace(tokens, **asked)

    @torch.inference_mode()
    def look(self, question: Question, prune: PruneSpec) -> Look:
        tokens = self.tokens(question, prune)
        pruner = pruners.create(prune.method.name, **prune.method.params)
        sensitivity = None
        if prune.sensitivity:
            sensitivity = metrics.create(prune.sensitivity.name, **prune.sensitivity.params)(tokens.projected)
        fusion = fusions.create(prune.fusion.name, **prune.fusion.params) if prune.fusion else None
        # Where an image has as many tokens as its size makes, a small one keeps all it has.
        keep = min(prune.keep, tokens.count) if self.family.view_tokens is None else prune.keep
        selection = pruner.select(tokens, keep, sensitivity, fusion)
        relevance = pruner.relevance(tokens)
        scaled = [None if scores is None else min_max(scores.float())[0].cpu() for scores in (relevance, sensitivity)]
        return Look(scaled[0], scaled[1], selection, tokens.grid)

    def _tower(self, needs: frozenset[str]) -> Any:
        if not needs & {"image_embeds", "text_embeds"}:
            return None
        return joint_space(self.family, self.spec.text_tower, self.receipt)
