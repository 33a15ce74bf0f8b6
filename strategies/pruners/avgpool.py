"""The floor avgpool: tokens are averaged over cells of the image, whatever is in them."""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from qapbench import Pruner, Selection, VisionTokens, pruner


@pruner("avgpool")
@dataclass(frozen=True)
class AvgPool(Pruner):
    """Cut the grid of tokens into `keep` cells, and replace each by the mean of its projected tokens.

    Cells are as square as their number allows (see `cells`): 64 of 24 x 24 tokens are 3 x 3 each. A cell's mean stands
    at the place of the token nearest to the cell's centre. The method tells no tokens apart. With a sensitivity, which
    no published floor has, the mean is weighted by the scores, and stands at the place of the highest one.

    Source:
        No paper. A floor: what a method has to beat that looks at the tokens.
    """

    needs = frozenset({"grid"})
    optional = frozenset({"grid"})

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return torch.ones(tokens.projected.shape[:2], device=tokens.projected.device, dtype=torch.float32)

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        grid = tokens.grid or (1, tokens.count)
        member = one_hot(cells(grid, keep).to(scores.device), keep).T  # [keep, N]
        weights = member * (scores + torch.finfo(scores.dtype).tiny).unsqueeze(1)
        mean = (weights / weights.sum(dim=-1, keepdim=True)) @ tokens.projected.float()
        return placed(mean, member.sum(dim=1) > 1, member.bool(), scores, grid)


def placed(values: Tensor, made: Tensor, member: Tensor, scores: Tensor, grid: tuple[int, int]) -> Selection:
    """The selection of one token per cell, each at the place of its cell's highest score.

    Of equal scores the one nearest to the cell's centre counts, and of equally near ones that with the lower index.

    Args:
        values: [B, K, D] the cells' tokens.
        made: [K] whether a cell's token was made from several.
        member: [K, N] bool, which tokens of the grid a cell has.
        scores: [B, N].
        grid: (height, width) of the N tokens.
    """
    axes = (torch.arange(size, device=scores.device, dtype=scores.dtype) for size in grid)
    at = torch.cartesian_prod(*axes)  # [N, 2]
    centre = member.to(at) @ at / member.sum(dim=1, keepdim=True)
    own = torch.where(member, scores.unsqueeze(1), -torch.inf)  # [B, K, N]
    best = own == own.amax(dim=-1, keepdim=True)
    away = (at - centre.unsqueeze(1)).square().sum(dim=-1)
    place = torch.where(best, away, torch.inf).argmin(dim=-1)
    order = place.argsort(dim=-1)
    updated = values.gather(1, order.unsqueeze(-1).expand_as(values))
    return Selection(place.gather(1, order), updated=updated, made=made[order])


def cells(grid: tuple[int, int], keep: int) -> Tensor:
    """The cell of each token of a grid that is cut into `keep` cells: [height * width].

    Rows of the grid are cut into bands, and each band into cells, as evenly as possible. The number of bands is the one
    that makes cells nearest to squares.

    Args:
        grid: (height, width).
        keep: number of cells, at most one per token.
    """
    height, width = grid
    bands = max(round(sqrt(keep * height / width)), -(-keep // width), 1)
    bands = min(bands, height, keep)
    found = []
    for row in range(height):
        band = row * bands // height
        first, last = keep * band // bands, keep * (band + 1) // bands
        found += [first + column * (last - first) // width for column in range(width)]
    return torch.tensor(found)
