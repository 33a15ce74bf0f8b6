"""The prompt as the decoder receives it, and results that several selections for one prompt share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from qapbench.methods.tokens import Selection
from qapbench.models import Family
from qapbench.models.encoded import EncodedImages
from qapbench.receipt import ImageTokens

from .splice import PrunedImage


@dataclasses.dataclass
class Memo:
    """Results that several selections for one prompt share, so that each is computed once.

    Attributes:
        image: results that depend on the images alone.
        question: results that depend on the prompt too.
    """

    image: dict[Hashable, Any] = dataclasses.field(default_factory=dict)
    question: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    def of(self, views: Hashable) -> Memo:
        """The memo for some of the views.

        Args:
            views: identifies these views.
        """
        return Memo(self.image.setdefault(views, {}), self.question.setdefault(views, {}))


@dataclasses.dataclass(frozen=True)
class PruningView:
    """The scores and the selection of one view (an image, or a tile of one), with tensors on the host.

    Attributes:
        image: index of the image in its prompt.
        count: number of tokens of the view before any pruning.
        present: [n] indices, among these, of the tokens that were left before this selection, ascending.
        grid: (height, width) of the view's tokens; None if they form no grid.
        relevance: [n] scores of the tokens present, on their own scale; None if the pruner has no relevance.
        sensitivity: [n] scores of the tokens present, on their own scale; None if there is no metric.
        kept: [K] indices of the kept tokens among the `count`, ascending.
        merged: number of tokens that were made from several.
        layer: index of the first layer after the drop, for a pruner inside the decoder; None for one in front of it.
    """

    image: int
    count: int
    present: Tensor
    grid: tuple[int, int] | None
    relevance: Tensor | None
    sensitivity: Tensor | None
    kept: Tensor
    merged: int
    layer: int | None = None

    @staticmethod
    def of(
        image: int,
        count: int,
        present: Tensor,
        grid: tuple[int, int] | None,
        scores: tuple[Tensor | None, Tensor | None],
        selection: Selection,
        row: int = 0,
        layer: int | None = None,
    ) -> PruningView:
        """The view in one row of a batched selection.

        Args:
            image: index of the image in its prompt.
            count: number of tokens of the view before any pruning.
            present: [n] indices of the tokens that were left before this selection.
            grid: (height, width) of the view's tokens.
            scores: (relevance, sensitivity), each [B, n] or None.
            selection: the batched selection.
            row: row of the view in the batch.
            layer: index of the first layer after the drop.
        """
        relevance, sensitivity = (None if values is None else values[row].float().cpu() for values in scores)
        kept = present.cpu()[selection.indices[row].cpu()]
        made = 0 if selection.made is None else int(selection.made[row].sum())
        merged = selection.budget - selection.indices.shape[1] + made
        return PruningView(image, count, present.cpu(), grid, relevance, sensitivity, kept, merged, layer)


Inside = Callable[[], contextlib.AbstractContextManager[Callable[[], list[PrunedImage]]]]
"""Opens a context in which the decoder prunes the prompt. It yields a function that then gives the images."""


@dataclasses.dataclass(frozen=True)
class PrunedPrompt:
    """A prompt and its images' features, as the language model receives them.

    Attributes:
        inputs: the model's keyword arguments without the images, with one placeholder per token in `features`.
        features: one [K, D] per image.
        images: the token counts that are stored with an answer.
        chosen: the images after pruning; None if nothing was selected in front of the decoder.
        inside: opens the context in which the prompt has to run, without a batch, if the decoder prunes it; else None.
        tag: tells it apart from a prompt with the same inputs and features.
        removed: number of columns that pruning in front of the decoder took out of the prompt.
    """

    inputs: dict[str, Any]
    features: list[Tensor]
    images: list[ImageTokens]
    chosen: list[PrunedImage] | None = None
    inside: Inside | None = None
    tag: str = ""
    removed: int = 0


def unpruned(prompt: dict[str, Any], encoded: EncodedImages, family: Family) -> PrunedPrompt:
    """The prompt with every token of every image.

    Args:
        prompt: the model's keyword arguments.
        encoded: its images.
        family: the model.
    """
    inputs = {name: value for name, value in prompt.items() if name not in family.image_inputs}
    positions = family.positions(prompt)
    if positions is not None:
        inputs["position_ids"] = positions
    features = [image.features for image in encoded.images]
    return PrunedPrompt(inputs, features, [ImageTokens(available=image.count) for image in encoded.images])
