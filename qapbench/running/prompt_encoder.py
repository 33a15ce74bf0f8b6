"""Turns questions into the prompts that the decoder receives. Runs share the encoding of each image."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from qapbench.models import Family
from qapbench.models.encoded import EncodedImages
from qapbench.models.relevance import Kept
from qapbench.prune.prompt import Memo, PrunedPrompt, unpruned
from qapbench.prune.pruning import Ask, Pruning
from qapbench.tasking.images import decode
from qapbench.tasking.questions import Question, RefusedPictureError, processor_inputs

from .plan import PruneKey
from .refusals import left_out

Stage = Callable[[str], contextlib.AbstractContextManager[Any]]
"""Makes a context, from the name of a stage, that measures the time spent inside it."""


class Asked(NamedTuple):
    """A question to encode.

    Attributes:
        question: the question, whose images are encoded.
        prompt: text of the prompt.
        prune_keys: keys of `PromptEncoder.prunings`, or None for every token.
    """

    question: Question
    prompt: str
    prune_keys: tuple[PruneKey, ...]


@dataclasses.dataclass
class _Encoded:
    """A question on the way to its prompts.

    Attributes:
        question: the question.
        inputs: the model's keyword arguments.
        images: its images after tower and projector; None if it has none.
        memo: what selections for it share.
        prompts: its prompts so far, by prune key.
    """

    question: Question
    inputs: dict[str, Any]
    images: EncodedImages | None
    memo: Memo
    prompts: dict[PruneKey, PrunedPrompt] = dataclasses.field(default_factory=dict)

    @property
    def with_images(self) -> EncodedImages:
        """The images.

        Raises:
            LookupError: there are none.
        """
        if self.images is None:
            raise LookupError(f"question {self.question.id} has no image")
        return self.images


class PromptEncoder:
    """Encodes questions under several pruning configurations on one model.

    All paths from a question to the tokens that the decoder receives lead through here. Only the images of the latest
    question stay in memory afterwards, so questions on the same image should follow each other.

    Args:
        family: the model.
        processor: the model's processor.
        prunings: prune key -> pruning.
        stage: measures the time of a stage.
        kept: embeddings of texts on disk, by the identity of their text tower.
        copies: how often each prompt stands in the batch that it becomes.
    """

    def __init__(
        self,
        family: Family,
        processor: Any,
        prunings: Mapping[str, Pruning],
        stage: Stage = lambda name: contextlib.nullcontext(),
        kept: Mapping[int, Kept] | None = None,
        copies: int = 1,
    ) -> None:
        self.family = family
        self.processor = processor
        self.prunings = prunings
        self.stage = stage
        self.kept = kept or {}
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
                    tower.embed_texts(texts, self.kept.get(id(tower)))

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
        (found,) = self.encode_each([Asked(question, prompt, tuple(prune_keys))])
        if isinstance(found, RefusedPictureError):
            raise found
        return found

    @torch.no_grad()  # not inference_mode, whose tensors have no version to tell a shared input that was changed
    def encode_each(self, asked: Sequence[Asked]) -> list[dict[PruneKey, PrunedPrompt] | RefusedPictureError]:
        """What `encode` gives for each of several questions, or the error with which it refuses one.

        Their tokens are chosen side by side. No prompt depends on the others.

        Args:
            asked: the questions. Their images are in memory together.
        """
        ready: list[_Encoded | RefusedPictureError] = []
        for one in asked:
            try:
                ready.append(self._encoded(one))
            except RefusedPictureError as error:
                ready.append(error)
        found: list[dict[PruneKey, PrunedPrompt] | RefusedPictureError] = []
        shown: dict[PruneKey, list[_Encoded]] = {}
        for one, made in zip(asked, ready, strict=True):
            if isinstance(made, RefusedPictureError):
                found.append(made)
            elif made.images is None:
                found.append(dict.fromkeys(one.prune_keys, PrunedPrompt(made.inputs, [], [])))
            else:
                found.append(made.prompts)
                for key in one.prune_keys:
                    shown.setdefault(key, []).append(made)
        with self.stage("choose") if shown else contextlib.nullcontext():
            for key, several in shown.items():
                for made, prompt in zip(several, self._pruned(key, several), strict=True):
                    made.prompts[key] = prompt
        return found

    def _encoded(self, asked: Asked) -> _Encoded:
        """A question's inputs, and its images if it has any."""
        question = asked.question
        with self.stage("prompt"):
            inputs = self.inputs(question, asked.prompt)
        if not question.images:
            return _Encoded(question, inputs, None, Memo())
        if self._latest is None or self._latest[0] != question.pictures:
            with self.stage("vision"):
                self._latest = None
                self._latest = question.pictures, self.family.seen_images(inputs, self.needs), {}
        return _Encoded(question, inputs, self._latest[1], Memo(image=self._latest[2]))

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

    def _pruned(self, key: PruneKey, several: Sequence[_Encoded]) -> list[PrunedPrompt]:
        """The prompts of several questions with images under one prune key."""
        whole = [unpruned(one.inputs, one.with_images, self.family) for one in several]
        if key is None:
            return whole
        pruning, asks = self.prunings[key], []
        for one in several:
            # A text tower needs a text. Without one, a question without words of its own is read as the prompt's
            # tokens.
            text = one.question.relevance_text if pruning.reader.needs_text else one.question.own_words
            texts = None if text is None else [text] * len(one.with_images.images)
            asks.append(Ask(one.inputs, one.with_images, texts, one.memo))
        return [_dense_if_equal(*pair) for pair in zip(pruning.prune_each(asks), whole, strict=True)]


def _dense_if_equal(pruned: PrunedPrompt, dense: PrunedPrompt) -> PrunedPrompt:
    """A prompt that kept every token becomes the dense one: its content key is the same, so they share an answer."""
    if pruned.inside is not None or len(pruned.features) != len(dense.features):
        return pruned
    same = all(map(torch.equal, pruned.features, dense.features))
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
