"""What vision tower and prompt hold of an image, known from its size alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qapbench.methods.tokens import VisionTokens

from .encoded import EncodedImages, Views

Size = tuple[int, int]
"""Height and width of an image in pixels."""


@dataclass(frozen=True)
class ImageOutline:
    """The images of a call, without their content.

    Attributes:
        encoded: the images as `Family.encode_images` would give them, with features of width one.
        attended: for each layer of the vision tower, the lengths of the sequences within which it attends.
        patches: number of patches that the tower embeds.
        projected: number of tokens that the projector makes.
    """

    encoded: EncodedImages
    attended: tuple[tuple[int, ...], ...]
    patches: int
    projected: int


def blank_tokens(views: int, count: int, grid: tuple[int, int] | None = None) -> VisionTokens:
    """Tokens [views, count, 1] that say how many there are, and nothing else."""
    return VisionTokens(torch.zeros(views, count, 1), grid=grid)


def each_alone(tokens: Sequence[VisionTokens]) -> list[Views]:
    """Images that are a single view each, as views grouped by their size.

    Args:
        tokens: for each image, its tokens as a batch of one.
    """
    return Views.grouped(Views(one, [index], torch.arange(one.count)[None]) for index, one in enumerate(tokens))
