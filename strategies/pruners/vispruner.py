"""The pruner VisPruner: important tokens by attention, and diverse ones among the others."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qapbench import Fraction, Pruner, Selection, VisionTokens, pruner

STEP = 8  # tokens that one round removes, as in the released code


@pruner("vispruner")
@dataclass(frozen=True)
class VisPruner(Pruner):
    """Keep the patches that the CLS token attends to most, and of the other patches those that are least alike.

    The score is the attention fused with sensitivity. floor(keep * important) patches are taken by score. The diverse
    ones are what is left after similar patches were removed in rounds (see `distinct`), which start in the order of the
    score. Sensitivity thus enters the important part fully, and the diverse part only through the patches that are
    compared with each other.

    One thing differs from the released code, which fails if the number of remaining patches is odd or if a round would
    remove more than half of them. Here one side of the comparison is then longer by one, and a round removes at most
    one side.

    Attributes:
        important: share of the budget for important patches; the rest is for diverse ones. The release has 0.5.

    Source:
        VisPruner (arXiv 2412.01818).
    """

    needs = frozenset({"cls_attention", "patches"})
    important: Fraction = 0.5

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return tokens.require("cls_attention", "vispruner")

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        order = scores.argsort(dim=-1, descending=True, stable=True)
        important = int(keep * self.important)
        if important == keep:
            return Selection(order[:, :keep])
        features = normalize(tokens.require("patches", "vispruner").float(), dim=-1)
        diverse = distinct(features @ features.mT, order[:, important:], keep - important)
        return Selection(torch.cat([order[:, :important], diverse], dim=1))


def distinct(cosine: Tensor, left: Tensor, keep: int) -> Tensor:
    """Remove similar tokens in rounds until `keep` are left.

    In each round, every second token of the list is compared with all the others, and those most similar to one of them
    are removed. The ones that stay move to the front of the list, the most similar first, which decides what is
    compared in the next round. Of equally similar tokens the one earlier in the list stays.

    Args:
        cosine: [B, N, N] cosine similarity of all tokens.
        left: [B, R] indices of the tokens to choose from, in the order of the first round.
        keep: number of tokens to leave, 1 <= keep <= R.

    Returns:
        [B, keep] distinct indices.
    """
    rows = torch.arange(len(left), device=left.device).view(-1, 1, 1)
    while (excess := left.shape[1] - keep) > 0:
        one, other = left[:, ::2], left[:, 1::2]
        likeness = cosine[rows, one.unsqueeze(2), other.unsqueeze(1)].amax(dim=-1)
        stay = one.shape[1] - min(STEP, excess, one.shape[1])
        ranked = likeness.argsort(dim=-1, stable=True)[:, :stay].flip(-1)
        left = torch.cat([one.gather(1, ranked), other], dim=1)
    return left
