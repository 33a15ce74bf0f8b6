"""DivPrune: the max-min diversity problem, solved greedily (arXiv 2503.02175)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qapbench import Pruner, Selection, VisionTokens, pruner

TOLERANCE = 1e-6  # of a cosine distance: float32 cannot tell less from zero


@pruner("divprune")
@dataclass(frozen=True)
class DivPrune(Pruner):
    """Adds, again and again, the token farthest (1 - cosine) from the nearest of those chosen, on projected features.

    The method knows no relevance: to it every token is worth the same. Where a sensitivity is fused in, a token's
    distance is multiplied by its score; without one this is the published method.

    Differs from the reference: a token is never chosen twice. Tokens at no distance from those chosen come last, by
    score.
    """

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return torch.ones(tokens.projected.shape[:2], device=tokens.projected.device)

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        features = normalize(tokens.projected.float(), dim=-1)
        cosine = features @ features.mT
        # Two tokens may be each other's nearest and tie for the first place: no rounding may decide between them.
        cosine = (cosine + cosine.mT) / 2
        return Selection(max_min(1 - cosine, scores, keep))


def max_min(distance: Tensor, weight: Tensor, keep: int) -> Tensor:
    """Greedy max-min diversity: the first token is the one farthest from its nearest neighbour.

    Args:
        distance: [B, N, N], symmetric.
        weight: [B, N], not negative, multiplies a token's distance. Ties go to the lower index.

    Returns:
        [B, keep] distinct indices in the order of choice.
    """
    batch, count = weight.shape
    rows = torch.arange(batch, device=weight.device)
    itself = torch.eye(count, dtype=torch.bool, device=weight.device)
    nearest = distance.masked_fill(itself, torch.inf).amin(dim=-1)
    order = torch.empty(batch, keep, dtype=torch.long, device=weight.device)
    # Below every gain (>= 0), and ordered by weight: what a token without distance is worth.
    spent = weight - weight.amax(dim=-1, keepdim=True) - 1
    taken = torch.zeros_like(weight, dtype=torch.bool)
    for step in range(keep):
        gain = torch.where(nearest > TOLERANCE, weight * nearest, spent).masked_fill(taken, -torch.inf)
        chosen = gain.argmax(dim=-1)
        order[:, step] = chosen
        taken[rows, chosen] = True
        row = distance[rows, chosen]
        nearest = row if step == 0 else torch.minimum(nearest, row)
    return order
