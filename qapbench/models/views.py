"""What a model makes of the images of a call: the features it would read, and the tokens that may be pruned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qapbench.errors import UserError
from qapbench.tokens import VisionTokens


@dataclass(frozen=True)
class Views:
    """Pictures of one size, each pruned by itself: whole images, or the tiles that an image was cut into.

    Attributes:
        tokens: of B views, N each.
        owners: the image that each view is of.
        places: [B, N] where each token stands among its image's placeholders, ascending.
    """

    tokens: VisionTokens
    owners: list[int]
    places: Tensor

    @staticmethod
    def grouped(views: Iterable[Views]) -> list[Views]:
        """Views of one grid together, in the order in which each grid comes first."""
        groups: dict[tuple[int, int] | int, list[Views]] = {}
        for view in views:
            groups.setdefault(view.tokens.grid or view.tokens.count, []).append(view)
        return [
            Views(
                VisionTokens.cat([view.tokens for view in group]),
                [owner for view in group for owner in view.owners],
                torch.cat([view.places for view in group]),
            )
            for group in groups.values()
        ]


@dataclass(frozen=True)
class SeenImage:
    """One image as the language model reads it, unpruned.

    Attributes:
        features: [L, D], one for each of its placeholders.
        separators: [L] bool: tokens of the model's own (a new line), which no pruner sees; None where there are none.
        rows: [L] the row that each place belongs to: a separator stays while anything of its row does.
    """

    features: Tensor
    separators: Tensor | None = None
    rows: Tensor | None = None

    @property
    def count(self) -> int:
        """Tokens that can be pruned."""
        return len(self.features) - (0 if self.separators is None else int(self.separators.sum()))


@dataclass(frozen=True)
class Seen:
    """All images of a call, in the order of their placeholders, and their views."""

    images: list[SeenImage]
    views: list[Views]

    @property
    def single(self) -> VisionTokens:
        """The tokens of a call with one image, in the order of its placeholders.

        Raises:
            UserError: there are several images, or several views of one.
        """
        if len(self.images) != 1 or len(self.views) != 1 or self.views[0].tokens.batch != 1:
            raise UserError("model: only an image that is a single view can be looked at, not one cut into tiles")
        return self.views[0].tokens

    @staticmethod
    def whole(tokens: VisionTokens) -> Seen:
        """Images of one size, each a single view."""
        places = torch.arange(tokens.count, device=tokens.projected.device).expand(tokens.batch, -1)
        images = [SeenImage(features) for features in tokens.projected]
        return Seen(images, [Views(tokens, list(range(tokens.batch)), places)])
