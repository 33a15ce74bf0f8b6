"""Families whose images are tiles with square groups of patches shuffled into one token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from qapbench.errors import UserError
from qapbench.methods.tokens import VisionTokens

from .encoded import EncodedImage, EncodedImages, Views


def runs(ids: Tensor, token: int) -> list[tuple[int, int, int]]:
    """Unbroken runs of a token in a prompt, as (row, first column, column behind the last one).

    Args:
        ids: [B, L] token ids.
        token: the token.
    """
    found = []
    for row, marks in enumerate((ids == token).tolist()):
        start = 0
        for marked, run in itertools.groupby(marks):
            end = start + len(list(run))
            if marked:
                found.append((row, start, end))
            start = end
    return found


def check_runs(lengths: Sequence[int], tokens: VisionTokens) -> None:
    """Check that the runs of placeholders in a prompt consist of whole tiles, and hold all of them.

    Args:
        lengths: number of placeholders of each run.
        tokens: the tiles.

    Raises:
        UserError: they do not.
    """
    if any(length % tokens.count for length in lengths) or sum(lengths) != tokens.batch * tokens.count:
        raise UserError(
            f"input_ids hold runs of {list(lengths)} image placeholders, but {tokens.batch} tile(s) of {tokens.count} "
            "tokens were given"
        )


def tiled(tokens: VisionTokens, counts: Sequence[int]) -> EncodedImages:
    """Images of which every tile is a view.

    Args:
        tokens: the tiles of all images in the order of their placeholders.
        counts: number of tiles of each image.
    """
    owners = [image for image, count in enumerate(counts) for _ in range(count)]
    within = [tile for count in counts for tile in range(count)]
    places = torch.arange(tokens.count) + torch.tensor(within).unsqueeze(1) * tokens.count
    images = [EncodedImage(part.flatten(0, 1)) for part in tokens.projected.split(list(counts))]
    return EncodedImages(images, [Views(tokens, owners, places.to(tokens.projected.device))])
