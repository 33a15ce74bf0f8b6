"""VisPruner: important tokens by CLS attention, diverse ones from the rest (arXiv 2412.01818)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qapbench import Fraction, Pruner, Selection, VisionTokens, pruner

STEP = 8  # tokens that one round removes, as released


@pruner("vispruner")
@dataclass(frozen=True)
class VisPruner(Pruner):
    """Keeps the patches that CLS attends to most, and those of the rest that are least alike.

    Of `keep`, floor(keep * important) are taken by score, the others by `distinct`, whose rounds start in the order
    of score. Sensitivity enters in that score: fully in the important part, and in the diverse part only through who
    is compared with whom.

    Differs from the released code, which fails on an odd number of remaining tokens or where a round would remove
    more than half of them: there one side is longer by one, and a round removes at most one side.
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
    """Rounds of removal: every second token is compared with all the others, and the most alike go.

    Those that stay move to the front, the most alike first, which decides who is compared in the next round. On a
    tie the one earlier in the list stays.

    Args:
        cosine: [B, N, N] similarity of all tokens.
        left: [B, R] indices to choose from, in the order of the first round.

    Returns:
        [B, keep] distinct indices; 1 <= keep <= R.
    """
    rows = torch.arange(len(left), device=left.device).view(-1, 1, 1)
    while (excess := left.shape[1] - keep) > 0:
        one, other = left[:, ::2], left[:, 1::2]
        likeness = cosine[rows, one.unsqueeze(2), other.unsqueeze(1)].amax(dim=-1)
        stay = one.shape[1] - min(STEP, excess, one.shape[1])
        ranked = likeness.argsort(dim=-1, stable=True)[:, :stay].flip(-1)
        left = torch.cat([one.gather(1, ranked), other], dim=1)
    return left
