"""State of one prompt in the decoder: the tokens left of each view, and the columns that each layer holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qapbench.methods.kinds import Stage
from qapbench.methods.tokens import Selection
from qapbench.models.encoded import EncodedImage, EncodedImages

from .splice import PrunedImage
from .token_layout import TokenLayout


@dataclass
class ViewState:
    """One view (an image, or a tile of one) on its way through the decoder's layers.

    Columns are columns of the prompt, places are positions among the placeholders of the view's image.

    Attributes:
        image: index of the view's image in the call.
        row: row of the batch that holds it.
        keep: the view's budget.
        text: [L] columns of the text after the image, up to the end of the question.
        entered: [E] columns at which the view's tokens entered the decoder.
        places: [E] places of these tokens.
        grid: (height, width) of the grid of these tokens, if they form one.
        steps: the drops that the spec says, with the view's own budgets; empty for those of the method.
        left: [n] indices, among the E tokens, of the tokens that are left.
        made: [n] bool, True for a token that was made from several.
        budgets: index of the first layer after a stage -> tokens that the stage keeps.
        counts: number of tokens that each layer so far has received.
    """

    image: int
    row: int
    keep: int
    text: Tensor
    entered: Tensor
    places: Tensor
    grid: tuple[int, int] | None = None
    steps: tuple[Stage, ...] = ()
    left: Tensor = field(init=False)
    made: Tensor = field(init=False)
    budgets: dict[int, int] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left = torch.arange(len(self.entered), device=self.entered.device)
        self.made = torch.zeros_like(self.left, dtype=torch.bool)

    @property
    def columns(self) -> Tensor:
        """Columns [n] of the tokens that are left."""
        return self.entered[self.left]

    def narrow(self, selection: Selection) -> None:
        """Keep only the tokens that `selection` keeps.

        Args:
            selection: a selection from the tokens that are left, as a batch of one.
        """
        kept = selection.indices[0]
        self.left, self.made = self.left[kept], self.made[kept]
        if selection.made is not None:
            self.made = self.made | selection.made[0]


def view_states(
    encoded: EncodedImages,
    budgets: list[list[int]],
    spans: list[tuple[int, Tensor]],
    asked: list[Tensor],
    schedules: list[list[tuple[Stage, ...]]] | None = None,
) -> list[ViewState]:
    """Make the states of all views of a call, in the order of their images.

    Args:
        encoded: the images of the call.
        budgets: tokens that each view keeps, listed like `encoded.views`.
        spans: row and columns of each image's placeholders, from `image_columns`.
        asked: for each image, [L] bool, True for the text of its row that the pruner may read.
        schedules: the drops of each view, listed like `encoded.views`; None for those of the method.
    """
    found = []
    steps = schedules or [[()] * len(keeps) for keeps in budgets]
    for views, keeps, drops in zip(encoded.views, budgets, steps, strict=True):
        for image, places, keep, own_drops in zip(views.owners, views.places, keeps, drops, strict=True):
            row, own = spans[image]
            text = asked[image].nonzero()[:, 0]
            text = text[text > own[-1]]
            found.append(ViewState(image, row, keep, text, own[places], places, views.tokens.grid, own_drops))
    return sorted(found, key=lambda view: view.image)


@dataclass
class DecoderState:
    """The state of one prompt in the decoder, and afterwards of the KV caches that it filled.

    Attributes:
        view_states: the views, sorted by image.
        images: the images of the call.
        layouts: the columns of the prompt that each layer holds.
        rotary: cosine and sine of the prompt's columns in the layer that ran last; None before the first one.
        embedded: [B, L, D] hidden states with which the prompt entered; None if the pruner does not read them.
        times: number of copies of each row in the batch (beams).
        tail: number of columns behind the prompt with which the call came.
        again: whether the prompt passes another time, without a KV cache. It is then neither counted nor shown.
        kept: the result for each image; filled when the prompt leaves the last layer.
    """

    view_states: list[ViewState]
    images: list[EncodedImage]
    layouts: list[TokenLayout]
    rotary: tuple[Tensor, Tensor] | None = None
    embedded: Tensor | None = None
    times: int = 1
    tail: int = 0
    again: bool = False
    kept: list[PrunedImage] = field(default_factory=list)

    def enter(self, batch: int, length: int) -> None:
        """Adapt to the hidden states with which the call enters the decoder.

        Rows may be repeated (beams), and an answer to score may follow the prompt.

        Args:
            batch: number of rows of the hidden states.
            length: their number of columns.
        """
        base = self.layouts[0]
        prompt = base.columns.shape[1]
        self.times = batch // len(base.columns)
        if self.times > 1:
            base = base.repeated(self.times)
        self.tail = length - prompt
        if self.tail:
            base = base.behind(prompt, self.tail)
        self.layouts = [base] * len(self.layouts)
        self.view_states = [
            replace(view, row=view.row * self.times + copy, counts=[])
            for view in self.view_states
            for copy in range(self.times)
        ]

    @property
    def stages(self) -> set[int]:
        """Indices of the layers before which tokens are dropped."""
        return {index for view in self.view_states for index in view.budgets}

    def whole(self, index: int) -> bool:
        """Whether the layer with this index receives the whole prompt."""
        return self.layouts[index] is self.layouts[0]
