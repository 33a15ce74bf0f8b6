"""Turns questions into the prompts that the decoder receives. Runs share the encoding of each image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from qapbench.models import Family
from qapbench.models.encoded import EncodedImages
from qapbench.prune.prompt import Memo, PrunedPrompt, unpruned
from qapbench.prune.pruning import Pruning
from qapbench.tasking.images import decode
from qapbench.tasking.questions import Question, RefusedPictureError, processor_inputs

from .plan import PruneKey
from .refusals import left_out

Stage = Callable[[str], contextlib.AbstractContextManager[Any]]
"""Makes a context, from the name of a stage, that measures the time spent inside it."""


class PromptEncoder:
    """Encodes questions under several pruning configurations on one model.

    All paths from a question to the tokens that the decoder receives lead through here. Only the images of the latest
    question stay in memory, so questions on the same image should follow each other.

    Args:
        family: the model.
        processor: the model's processor.
        prunings: prune key -> pruning.
        stage: measures the time of a stage.
        copies: how often each prompt stands in the batch that it becomes.
    """

    def __init__(
        self,
        family: Family,
        processor: Any,
        prunings: Mapping[str, Pruning],
        stage: Stage = lambda name: contextlib.nullcontext(),
        copies: int = 1,
    ) -> None:
        self.family = family
        self.processor = processor
        self.prunings = prunings
        self.stage = stage
        self.copies = copies
        self.needs = frozenset[str]().union(*(one.needs for one in prunings.values()))
        self._latest: tuple[tuple[str, ...], EncodedImages, dict[Any, Any]] | None = None

    def expect(self, questions: Iterable[Question]) -> None:
        """Embed the texts of questions that will be encoded soon, side by side."""
        towers = {id(one.reader.tower): one.reader.tower for one in self.prunings.values() if one.reader.needs_text}
        texts = [question.relevance_text for question in questions if question.images]
        for tower in towers.values():
            if tower is not None:
                with self.stage("choose"):
                    tower.embed_texts(texts)

    @torch.no_grad()  # not inference_mode, whose tensors have no version to tell a shared input that was changed
    def encode(self, question: Question, prompt: str, prune_keys: Iterable[PruneKey]) -> dict[PruneKey, PrunedPrompt]:
        """The prompt of a question under each prune key.

        A question without an image has the same prompt under all of them.

        Args:
            question: the question, whose images are encoded.
            prompt: text of the prompt.
            prune_keys: keys of `prunings`, or None for every token.

        Raises:
            RefusedPictureError: the processor does not accept the question's pictures.
        """
        with self.stage("prompt"):
            inputs = self.inputs(question, prompt)
        if not question.images:
            return dict.fromkeys(prune_keys, PrunedPrompt(inputs, [], []))
        if self._latest is None or self._latest[0] != question.pictures:
            with self.stage("vision"):
                self._latest = None
                self._latest = question.pictures, self.family.encode_images(inputs, self.needs), {}
        _, encoded, of_image = self._latest
        memo = Memo(image=of_image)
        with self.stage("choose"):
            return {key: self._pruned(key, inputs, encoded, question, memo) for key in prune_keys}

    @property
    def encoded(self) -> EncodedImages:
        """The images of the question that was encoded last.

        Raises:
            LookupError: no question with images was encoded yet.
        """
        if self._latest is None:
            raise LookupError("no question with images was encoded yet")
        return self._latest[1]

    def inputs(self, question: Question, prompt: str) -> dict[str, Any]:
        """The model's keyword arguments for a prompt of the question, on the model's device, with an attention mask.

        Its images are decoded, and `question.transparent` is set.

        Raises:
            RefusedPictureError: the processor does not accept the question's pictures.
        """
        made = _processed(self.processor, question, prompt)
        placed = {key: value.to(self.family.model.device) for key, value in made.items()}
        if self.copies > 1:  # every input begins with prompts, or with what their images are made of
            placed = {key: torch.cat([value] * self.copies) for key, value in placed.items()}
        return {"attention_mask": torch.ones_like(placed["input_ids"]), **placed}

    def _pruned(
        self, key: PruneKey, inputs: dict[str, Any], encoded: EncodedImages, question: Question, memo: Memo
    ) -> PrunedPrompt:
        dense = unpruned(inputs, encoded, self.family)
        if key is None:
            return dense
        pruning = self.prunings[key]
        # A text tower needs a text. Without one, a question without words of its own is read as the prompt's tokens.
        text = question.relevance_text if pruning.reader.needs_text else question.own_words
        texts = None if text is None else [text] * len(encoded.images)
        pruned = pruning.prune(inputs, encoded, texts, memo)
        if pruned.inside is not None:
            return pruned
        same = len(pruned.features) == len(dense.features) and all(map(torch.equal, pruned.features, dense.features))
        # A prompt that kept every token becomes the dense one: its content key is the same, so they share an answer.
        return PrunedPrompt(dense.inputs, dense.features, pruned.images) if same else pruned


def first_accepted(questions: Sequence[Question], processor: Any) -> Question:
    """The first question that the model's processor accepts: the same in every process and session.

    Those before it are noted as refused.

    Raises:
        RunFailedError: the processor refuses more questions than a run may leave out.
    """
    for question in questions:
        if not question.images:
            return question
        try:
            _processed(processor, question, question.prompt)
            return question
        except RefusedPictureError as error:
            question.refused = error.why
            left_out(questions)
    raise LookupError("no question is left")  # `left_out` raises before


def _processed(processor: Any, question: Question, prompt: str) -> dict[str, Any]:
    """What the processor makes of a prompt of the question. Its images are decoded, and `transparent` is set.

    Raises:
        RefusedPictureError: the processor does not accept the question's pictures.
    """
    shown = [decode(image) for image in question.images]
    question.transparent = tuple(one.transparent for one in shown)
    try:
        return processor_inputs(processor, prompt, [one.picture for one in shown])
    except RefusedPictureError as error:
        raise RefusedPictureError(error.why, question.id) from None
