"""The question of a prompt: which text it is, and the fields of visual tokens that depend on it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from qapbench.errors import UserError
from qapbench.methods.tokens import VisionTokens
from qapbench.models import Family
from qapbench.models.relevance import QuestionReader
from qapbench.quantize.call_tokens import UNLABELLED


def asked_text(text: Tensor, labels: Tensor | None, spans: list[tuple[int, Tensor]]) -> list[Tensor]:
    """For each image, the text of its row that a pruner may read: [L] bool each.

    Without labels the whole text is the prompt. With labels, the first labelled token behind an image begins the
    answer: this token and everything behind it are not read, so that an answer which is scored does not choose the
    tokens that it is scored on. If all of a row's text is labelled, it holds no question, and nothing is left to read.

    Args:
        text: [B, L] bool, True for text, False for placeholders and padding.
        labels: [B, L] labels of the call, -100 where there is none; None if the call has no labels.
        spans: row and columns of each image's placeholders, from `image_columns`.
    """
    if labels is None:
        return [text[row] for row, _ in spans]
    labelled = (labels != UNLABELLED) & text
    found = []
    for row, columns in spans:
        behind = torch.arange(text.shape[1], device=text.device) > columns[-1]
        answer = (labelled[row] & behind).cumsum(dim=0) > 0
        question = text[row] & ~labelled[row]
        found.append(text[row] & ~answer if question.any() else torch.zeros_like(answer))
    return found


@dataclasses.dataclass
class Questions:
    """Adds the fields that depend on the question, for one pruner on one model.

    Attributes:
        method: name of the pruner, for messages.
        family: the model.
        reader: computes the fields.
        processor: reads and writes the question's text; None stands for the tokenizer in the model's folder.
    """

    method: str
    family: Family
    reader: QuestionReader
    processor: Any

    def added(
        self, tokens: VisionTokens, question: Callable[[], Tensor], text: str | None, known: dict[Hashable, Any]
    ) -> VisionTokens:
        """Some views with the fields that the pruner reads. Pruners that read the same fields share them.

        Args:
            tokens: the views, with the fields of the images.
            question: makes [L] token ids of the text that the pruner may read.
            text: the question in words that the caller gave; None reads `question`.
            known: earlier results for these views and this question, to which these are added.

        Raises:
            UserError: there is no question.
        """
        if not self.reader.needs:
            return tokens
        if text is None and not len(question()):
            raise UserError(
                f"{self.method} compares an image with the question, and the prompt has none: leave the "
                "question's `labels` at -100, or pass `relevance_text=`"
            )
        given = None
        if text is None and self.reader.needs_text:
            text = self._decode(question())
        elif text is not None and self.reader.needs_words:
            given = self._spelled(text)
        asked = self.reader.of_question(tokens, text, question, given, known)
        return tokens.adding(self.reader.sign.value, **asked)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        """The tokenizer of the processor, or else of the model's folder; None if there is neither."""
        from transformers import AutoTokenizer

        if self.processor is not None:
            return getattr(self.processor, "tokenizer", self.processor)
        try:
            return AutoTokenizer.from_pretrained(self.family.model.name_or_path)
        except (OSError, ValueError):
            return None

    def _decode(self, question: Tensor) -> str | None:
        """The text of token ids [L]; None if there is no tokenizer."""
        return None if self._tokenizer is None else self._tokenizer.decode(question, skip_special_tokens=True)

    def _spelled(self, text: str) -> Tensor:
        """The language model's token ids [L] of a text, none of them special.

        Raises:
            UserError: there is no tokenizer, or no token.
        """
        if self._tokenizer is None:
            raise UserError(
                f"relevance_text: {self.method} reads it as tokens of the language model; `compress` a processor"
            )
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        if not ids:
            raise UserError("relevance_text: a text is empty")
        return torch.tensor(ids, device=self.family.model.device)
