"""The prompt as the decoder gets it, and what several selections for one prompt share."""

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
        image: what depends on the images alone.
        question: what depends on the prompt too.
    """

    image: dict[Hashable, Any] = dataclasses.field(default_factory=dict)
    question: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    def of(self, views: Hashable) -> Memo:
        """The part that concerns some of the views."""
        return Memo(self.image.setdefault(views, {}), self.question.setdefault(views, {}))


@dataclasses.dataclass(frozen=True)
class PruningView:
    """The scores and the selection of one view (an image, or a tile of one), on the host.

    Attributes:
        image: place of the image in its prompt.
        count: tokens of the view before any pruning; `present`: [n] those that were still there, ascending.
        grid: (height, width) of the view's tokens; None where they lie on none.
        relevance, sensitivity: [n] scores of the tokens present, on their own scales; None where there is none.
        kept: places among the `count`, ascending; `merged`: tokens made of several.
        layer: index of the first layer behind the stage, for a pruner inside the decoder; None in front of it.
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
        """The view in a row of a batched selection.

        Args:
            scores: (relevance, sensitivity), each [B, n] or None.
        """
        relevance, sensitivity = (None if values is None else values[row].float().cpu() for values in scores)
        kept = present.cpu()[selection.indices[row].cpu()]
        made = 0 if selection.made is None else int(selection.made[row].sum())
        merged = selection.budget - selection.indices.shape[1] + made
        return PruningView(image, count, present.cpu(), grid, relevance, sensitivity, kept, merged, layer)


Inside = Callable[[], contextlib.AbstractContextManager[Callable[[], list[PrunedImage]]]]
"""Opens a context for a prompt that is pruned while the decoder runs; it yields what then says what was kept."""


@dataclasses.dataclass(frozen=True)
class PrunedPrompt:
    """A prompt and its images' features, as the language model gets them.

    Attributes:
        inputs: keywords of the call without the images; a placeholder for each of `features`' tokens.
        features: one [K, D] per image.
        images: what is stored beside an answer.
        chosen: what became of each image; None where nothing was chosen.
        inside: opens the context in which a prompt runs that is pruned while the decoder runs, alone; None for others.
        tag: what tells it from a prompt with the same inputs and features.
    """

    inputs: dict[str, Any]
    features: list[Tensor]
    images: list[ImageTokens]
    chosen: list[PrunedImage] | None = None
    inside: Inside | None = None
    tag: str = ""


def unpruned(prompt: dict[str, Any], encoded: EncodedImages, family: Family) -> PrunedPrompt:
    """The prompt with every token of every image."""
    inputs = {name: value for name, value in prompt.items() if name not in family.image_inputs}
    positions = family.positions(prompt)
    if positions is not None:
        inputs["position_ids"] = positions
    features = [image.features for image in encoded.images]
    return PrunedPrompt(inputs, features, [ImageTokens(available=image.count) for image in encoded.images])
