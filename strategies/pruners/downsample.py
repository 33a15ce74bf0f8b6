"""The floor downsample: the vision tower sees the image at a lower size, whatever is in it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from qapbench import Pruner, Selection, VisionTokens, pruner

from .avgpool import cells, placed


@pruner("downsample")
@dataclass(frozen=True)
class Downsample(Pruner):
    """Scale the image down until its grid of tokens holds `keep`, and encode it anew at that size.

    The scaled image keeps about its shape: for 64 tokens of a square image, the tower sees 8 x 8 patches, with its
    position embeddings interpolated. If no grid of that shape has exactly `keep` tokens, the next larger one is cut
    into `keep` cells, and each is the mean of its tokens (32 tokens are cut from 6 x 6). A token stands at the middle
    of the part of the image that it shows, and counts as merged. The method tells no tokens apart. A sensitivity, which
    no published floor has, moves the places of tokens alone: to the highest score in their part of the image.

    Source:
        No paper. A floor: what a method has to beat that looks at the whole image at its full size.
    """

    needs = frozenset({"downsampled", "grid"})
    optional = frozenset({"grid"})

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return torch.ones(tokens.projected.shape[:2], device=tokens.projected.device, dtype=torch.float32)

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        small = tokens.require("downsampled", "downsample").float()
        height, width = small.shape[-2:]
        member = one_hot(cells((height, width), keep).to(scores.device), keep).T.float()  # [keep, Y * X]
        mean = (member / member.sum(dim=1, keepdim=True)) @ small.flatten(2).mT
        grid = tokens.grid or (1, tokens.count)
        part = one_hot(cells(grid, keep).to(scores.device), keep).T.bool()  # [keep, N]
        return placed(mean, torch.ones(keep, dtype=torch.bool, device=scores.device), part, scores, grid)
