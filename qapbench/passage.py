"""A prompt on its way through the decoder's layers: what is left of each view, and which columns each layer holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .columns import Layout
from .models.views import Seen, SeenImage
from .tokens import Selection


@dataclass
class Portion:
    """One view (an image, or a tile of one) on its way through the layers.

    Attributes:
        image: that it is of; row: of the batch.
        keep: its budget.
        text: [L] columns of the text behind the image, up to the end of the question.
        entered: [E] columns of the prompt that its tokens entered at; places: [E] theirs among the image's own.
        left: [n] which of the E are left; made: [n] bool, which of these were made of several.
        budgets: what the stages keep, by the index of the first layer behind each.
        counts: tokens that each layer saw.
    """

    image: int
    row: int
    keep: int
    text: Tensor
    entered: Tensor
    places: Tensor
    left: Tensor = field(init=False)
    made: Tensor = field(init=False)
    budgets: dict[int, int] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left = torch.arange(len(self.entered), device=self.entered.device)
        self.made = torch.zeros_like(self.left, dtype=torch.bool)

    @property
    def columns(self) -> Tensor:
        """[n] where the tokens stand that are left."""
        return self.entered[self.left]

    def narrow(self, selection: Selection | None) -> None:
        """To a selection of what is left; to nothing where there is none."""
        kept = self.left[:0] if selection is None else selection.indices[0]
        self.left, self.made = self.left[kept], self.made[kept]
        if selection is not None and selection.made is not None:
            self.made = self.made | selection.made[0]


def portions(seen: Seen, budgets: list[list[int]], spans: list[tuple[int, Tensor]], asked: Tensor) -> list[Portion]:
    """The views of a call, in the order of its images.

    Args:
        budgets: of every view, listed as `seen.views`.
        spans: row and columns of each image's placeholders.
        asked: [B, L] bool, the text of the prompt without its answer.
    """
    columns = torch.arange(asked.shape[1], device=asked.device)
    found = []
    for views, keeps in zip(seen.views, budgets, strict=True):
        for image, places, keep in zip(views.owners, views.places, keeps, strict=True):
            row, own = spans[image]
            text = columns[asked[row] & (columns > own[-1])]
            found.append(Portion(image, row, keep, text, own[places], places))
    return sorted(found, key=lambda portion: portion.image)


@dataclass
class Passage:
    """One prompt's way through the decoder, and what its KV caches hold afterwards.

    Attributes:
        portions: sorted by image.
        images: what was seen of these.
        layouts: of each layer.
        embedded: [B, L, D] the prompt as it entered, where a pruner reads that.
        times: how often each row stands in the batch (beams).
    """

    portions: list[Portion]
    images: list[SeenImage]
    layouts: list[Layout]
    embedded: Tensor | None = None
    times: int = 1

    def enter(self, batch: int, length: int) -> None:
        """As it comes in: every row several times in a row (beams), and with what follows the prompt in the call."""
        base = self.layouts[0]
        prompt = base.columns.shape[1]
        self.times = batch // len(base.columns)
        if self.times > 1:
            base = base.repeated(self.times)
        if length > prompt:
            base = base.behind(prompt, length - prompt)
        self.layouts = [base] * len(self.layouts)
        self.portions = [
            replace(portion, row=portion.row * self.times + copy, counts=[])
            for portion in self.portions
            for copy in range(self.times)
        ]

    @property
    def stages(self) -> set[int]:
        """Indices of the layers that tokens are dropped before."""
        return {index for portion in self.portions for index in portion.budgets}

    def whole(self, index: int) -> bool:
        """Whether that layer sees the whole prompt."""
        return self.layouts[index] is self.layouts[0]
