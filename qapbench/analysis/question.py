"""One question put to a model outside a run: its prompt, its options, and what a strategy would look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from qapbench.checkpoints import find_checkpoint
from qapbench.errors import Problem, UserError, nearest
from qapbench.models import family_of
from qapbench.models.family import default_tower
from qapbench.models.relevance import QuestionReader, find_tower, load_tower
from qapbench.run.tasks import LoadedTask
from qapbench.spec import PruneSpec, RunSpec
from qapbench.strategy import fusions, metrics, min_max, pruners
from qapbench.tokens import Selection, VisionTokens

MARK = "<image>"
TAIL = 32  # characters of a prompt that decide how the next token is spelled


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
    content: list[dict[str, str]] = []
    for index, part in enumerate(text.split(MARK)):
        content += [{"type": "image"}] if index else []
        part = part.removeprefix("\n") if index else part
        content += [{"type": "text", "text": part}] if part else []
    if getattr(processor, "chat_template", None):
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    else:
        prompt = text.replace(MARK, processor.image_token)
    (image,) = task.task.doc_to_image(doc)
    picture = (image if isinstance(image, Image.Image) else image.load()).convert("RGB")
    read = text.replace(MARK, "").strip()
    ids = list(_spelled(processor.tokenizer, prompt, options))
    return Question(name, read, prompt, doc.get("relevance_text") or read, picture, list(options), ids, truth)


def _spelled(tokenizer: Any, prompt: str, options: list[str]) -> Iterator[int]:
    tail = prompt[-TAIL:]
    before = tokenizer(tail, add_special_tokens=False).input_ids
    glue = "" if tail[-1:].isspace() else " "
    for option in options:
        ids = tokenizer(tail + glue + option, add_special_tokens=False).input_ids
        if ids[: len(before)] != before or len(ids) != len(before) + 1:
            raise UserError(Problem(f"the tokenizer does not spell option {option!r} as one token", ("model",)))
        yield ids[-1]


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
        self.fallback = ""

    def tokens(self, question: Question, prune: PruneSpec) -> VisionTokens:
        """Everything that the pruner reads about the question and its image: a batch of one."""
        pruner = pruners.create(prune.method.name, **prune.method.params)
        reader = QuestionReader(pruner.needs, self._tower(pruner.needs), self.family.model.get_input_embeddings())
        inputs = question.inputs(self.processor, self.family.model.device)
        needs = (pruner.needs & self.family.offers) | reader.visual
        seen = self.family.see(inputs[self.family.image_input], needs)
        if not reader.needs:
            return seen
        ids = inputs["input_ids"][0]
        asked: dict[str, Any] = reader.fields(seen, question.relevance_text, ids[ids != self.family.image_token])
        return dataclasses.replace(seen, **asked)

    @torch.inference_mode()
    def look(self, question: Question, prune: PruneSpec) -> Look:
        tokens = self.tokens(question, prune)
        pruner = pruners.create(prune.method.name, **prune.method.params)
        sensitivity = None
        if prune.sensitivity:
            sensitivity = metrics.create(prune.sensitivity.name, **prune.sensitivity.params)(tokens.projected)
        fusion = fusions.create(prune.fusion.name, **prune.fusion.params) if prune.fusion else None
        selection = pruner.select(tokens, prune.keep, sensitivity, fusion)
        relevance = pruner.relevance(tokens)
        scaled = [None if scores is None else min_max(scores.float())[0].cpu() for scores in (relevance, sensitivity)]
        return Look(scaled[0], scaled[1], selection, tokens.grid)

    def _tower(self, needs: frozenset[str]) -> Any:
        if not needs & {"image_embeds", "text_embeds"}:
            return None
        config = self.family.model.config
        folder = str(find_checkpoint(self.spec.model).folder)
        found, self.fallback = find_tower(self.spec.text_tower, folder, default_tower(config.to_dict()), True)
        return load_tower(found, config.vision_config.hidden_size, self.family.model.device) if found else None
