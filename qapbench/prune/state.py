"""State of one prompt in the decoder: the tokens left of each view, and the columns that each layer holds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from qapbench.methods.decoder_pruner import Stage
from qapbench.methods.tokens import Selection

from .splice import Part, PrunedImage
from .token_layout import TokenLayout


class Entering(NamedTuple):
    """One view as it enters the decoder.

    Attributes:
        part: its tokens.
        keep: its budget.
        grid: (height, width) of the grid of all its tokens, if they form one.
        steps: the drops that the spec says, with the view's own budgets; empty for those of the method.
    """

    part: Part
    keep: int
    grid: tuple[int, int] | None
    steps: tuple[Stage, ...]

    @classmethod
    def of(
        cls,
        part: Part,
        keeps: list[list[int]],
        grids: list[tuple[int, int] | None],
        drops: list[list[tuple[Stage, ...]]],
    ) -> Entering:
        """A view of a call's images, with what is listed for all of them as `EncodedImages.views` lists them."""
        group, view = part.at
        return cls(part, keeps[group][view], grids[group], drops[group][view])


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
        among: [E] indices of these tokens among all of the view; those that are missing left in front of the decoder.
        count: number of all tokens of the view.
        made: [n] bool, of the tokens that are left, True for one that was made from several.
        grid: (height, width) of the grid of all tokens, if they form one.
        steps: the drops that the spec says, with the view's own budgets; empty for those of the method.
        left: [n] indices, among the E tokens, of the tokens that are left.
        budgets: index of the first layer after a stage -> tokens that the stage keeps.
        counts: number of tokens that each layer so far has received.
    """

    image: int
    row: int
    keep: int
    text: Tensor
    entered: Tensor
    places: Tensor
    among: Tensor
    count: int
    made: Tensor
    grid: tuple[int, int] | None = None
    steps: tuple[Stage, ...] = ()
    left: Tensor = field(init=False)
    budgets: dict[int, int] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left = torch.arange(len(self.entered), device=self.entered.device)

    @property
    def columns(self) -> Tensor:
        """Columns [n] of the tokens that are left."""
        return self.entered[self.left]

    def narrow(self, selection: Selection) -> None:
        """Keep only the tokens that `selection` keeps.

        Args:
            selection: a selection from the tokens that are left, as a batch of one.
        """
        kept = selection.indices[0].to(self.left.device)
        self.left, self.made = self.left[kept], self.made[kept]
        if selection.made is not None:
            self.made = self.made | selection.made[0].to(self.made.device)


def view_states(
    images: list[PrunedImage],
    views: list[list[Entering]],
    spans: list[tuple[int, Tensor]],
    asked: list[Tensor],
) -> list[ViewState]:
    """Make the states of all views of a call, in the order of their images.

    Args:
        images: the images as they enter the decoder.
        views: for each image its views.
        spans: row and columns of each image's tokens in the prompt, from `image_columns`.
        asked: for each image, [L] bool, True for the text of its row that the pruner may read.

    Raises:
        RuntimeError: a token was merged in front of the decoder and has no place of its own.
    """
    found = []
    for index, (image, own) in enumerate(zip(images, views, strict=True)):
        row, columns = spans[index]
        text = asked[index].nonzero()[:, 0]
        text = text[text > columns[-1]]
        for part, keep, grid, steps in own:
            if part.between:
                raise RuntimeError("what is merged in front of the decoder needs a place there: use `updated`")
            home = columns.device  # images may be on another one than the prompt
            entered = columns[torch.searchsorted(image.places, part.kept).to(home)]
            among = torch.searchsorted(part.view, part.kept).to(home)
            made = torch.zeros_like(among, dtype=torch.bool) if part.made is None else part.made.to(home)
            count, kept = len(part.view), part.kept.to(home)
            found.append(ViewState(index, row, keep, text, entered, kept, among, count, made, grid, steps))
    return found


@dataclass
class DecoderState:
    """The state of one prompt in the decoder, and afterwards of the KV caches that it filled.

    Attributes:
        view_states: the views, sorted by image.
        images: the images of the call as they entered.
        layouts: the columns of the prompt that each layer holds.
        rotary: cosine and sine of the prompt's columns in the layer that ran last; None before the first one.
        embedded: [B, L, D] hidden states with which the prompt entered; None if the pruner does not read them.
        times: number of copies of each row in the batch (beams).
        tail: number of columns behind the prompt with which the call came.
        again: whether the prompt passes another time, without a KV cache. It is then neither counted nor shown.
        kept: the result for each image; filled when the prompt leaves the last layer.
    """

    view_states: list[ViewState]
    images: list[PrunedImage]
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
