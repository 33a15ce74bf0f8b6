"""Which text of a prompt is the question, and which is an answer that is scored behind it."""

from __future__ import annotations

import torch
from torch import Tensor

UNLABELLED = -100
"""Label of a token that no loss is computed on."""


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
