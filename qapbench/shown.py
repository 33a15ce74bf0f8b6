"""What the language model is shown of a prompt with images, and what several selections for it share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from .models import Family
from .models.views import Seen
from .splice import KeptImage


@dataclasses.dataclass
class Memo:
    """What several selections for one prompt have in common, so that it is computed once.

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
class Shown:
    """What the language model gets of a prompt with images.

    Attributes:
        inputs: keywords of the call without the images; a placeholder for each of `features`' tokens.
        features: one [K, D] an image.
        images: as stored beside an answer: `available`, and where it was pruned the indices `kept` and `merged`.
        chosen: what became of each image; None where nothing was chosen.
        inside: for what is chosen while the decoder runs: a context that is open meanwhile, and yields what then says
            `images`. Such a prompt runs alone.
        tag: what tells it from a prompt with the same inputs and features.
    """

    inputs: dict[str, Any]
    features: list[Tensor]
    images: list[dict[str, Any]]
    chosen: list[KeptImage] | None = None
    inside: Callable[[], contextlib.AbstractContextManager[Callable[[], list[dict[str, Any]]]]] | None = None
    tag: str = ""


def whole(prompt: dict[str, Any], seen: Seen, family: Family) -> Shown:
    """Every token of every image, as without pruning."""
    inputs = {name: value for name, value in prompt.items() if name not in family.image_inputs}
    positions = family.positions(prompt)
    if positions is not None:
        inputs["position_ids"] = positions
    features = [image.features for image in seen.images]
    return Shown(inputs, features, [{"available": image.count} for image in seen.images])
