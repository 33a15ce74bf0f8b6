"""The images of a model call after vision tower and projector: their features, and the tokens that may be pruned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qapbench.errors import UserError
from qapbench.methods.tokens import VisionTokens


@dataclass(frozen=True)
class Window:
    """The part of what the vision tower gets that a view shows, in patches.

    Attributes:
        row: which of the images and tiles that the tower gets.
        top: first line of patches; `bottom` is the one behind the last.
        left: first column of patches; `right` is the one behind the last.
    """

    row: int
    top: int
    bottom: int
    left: int
    right: int


@dataclass(frozen=True)
class Views:
    """Views with the same number of tokens. A view is a whole image or a tile of one, and each is pruned by itself.

    Attributes:
        tokens: the tokens of B views, N each.
        owners: for each view, the index of its image.
        places: [B, N] position of each token among its image's placeholders, ascending.
        windows: for each view, what it shows of the tower's input; empty where the family has no use for it.
    """

    tokens: VisionTokens
    owners: list[int]
    places: Tensor
    windows: tuple[Window, ...] = ()

    @staticmethod
    def grouped(views: Iterable[Views]) -> list[Views]:
        """Concatenate views of the same grid, or of the same token count if they have no grid.

        Grids keep the order of their first view.
        """
        groups: dict[tuple[int, int] | int, list[Views]] = {}
        for view in views:
            groups.setdefault(view.tokens.grid or view.tokens.count, []).append(view)
        return [
            Views(
                VisionTokens.cat([view.tokens for view in group]),
                [owner for view in group for owner in view.owners],
                torch.cat([view.places for view in group]),
                tuple(window for view in group for window in view.windows),
            )
            for group in groups.values()
        ]


@dataclass(frozen=True)
class EncodedImage:
    """One image as the language model reads it without pruning.

    Attributes:
        features: [L, W], one row for each of the image's placeholders. The first D columns are the token's feature in
            the language model's space; a model whose decoder gets more of a token has it in the columns behind.
        separators: [L] bool, True for tokens that the model adds itself (new lines) and that no pruner sees; None if
            there are none.
        rows: [L] int64, the line of tokens that each place belongs to. A separator stays as long as any token of its
            line does. None if there are no separators.
    """

    features: Tensor
    separators: Tensor | None = None
    rows: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of tokens that can be pruned."""
        return self.features.shape[0] - (0 if self.separators is None else int(self.separators.sum()))


@dataclass(frozen=True)
class EncodedImages:
    """All images of a model call after vision tower and projector.

    Attributes:
        images: in the order of their placeholders.
        views: the views of all images, in groups of the same size.
    """

    images: list[EncodedImage]
    views: list[Views]

    def to(self, device: torch.device) -> EncodedImages:
        """The same images with every tensor on a device; the same object if tokens and features are there."""
        moved = [one.tokens.to(device) for one in self.views]
        there = all(new is one.tokens for new, one in zip(moved, self.views, strict=True))
        if there and all(one.features.device == device for one in self.images):
            return self

        def placed(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        images = [
            EncodedImage(one.features.to(device), placed(one.separators), placed(one.rows)) for one in self.images
        ]
        views = [
            replace(one, tokens=new, places=one.places.to(device)) for one, new in zip(self.views, moved, strict=True)
        ]
        return EncodedImages(images, views)

    @property
    def single(self) -> VisionTokens:
        """The visual tokens of a call with one image that is a single view, in the order of its placeholders.

        Raises:
            UserError: there are several images, or several views of one.
        """
        if len(self.images) != 1 or len(self.views) != 1 or self.views[0].tokens.batch != 1:
            raise UserError("model: only an image that is a single view can be looked at, not one cut into tiles")
        return self.views[0].tokens

    @staticmethod
    def whole(tokens: VisionTokens) -> EncodedImages:
        """Images of one size, each a single view. `tokens` holds one row per image."""
        places = torch.arange(tokens.count, device=tokens.projected.device).expand(tokens.batch, -1)
        images = [EncodedImage(features) for features in tokens.projected]
        return EncodedImages(images, [Views(tokens, list(range(tokens.batch)), places)])
