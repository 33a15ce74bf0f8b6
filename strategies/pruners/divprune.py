"""The pruner DivPrune: diverse tokens by greedy solution of the max-min diversity problem."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qapbench import Pruner, Selection, VisionTokens, pruner

TOLERANCE = 1e-6  # float32 cannot tell a smaller cosine distance from zero


@pruner("divprune")
@dataclass(frozen=True)
class DivPrune(Pruner):
    """Keep tokens that are far apart: each next one is farthest from the nearest token chosen before it.

    The distance is 1 - cosine of the tokens' features after the projector. The method has no notion of relevance: all
    tokens are worth the same. If there is a sensitivity, each token's distance is multiplied by its score, which the
    published method does not do.

    One thing differs from the released code: a token is never chosen twice. Tokens that have no distance from those
    chosen come last, in the order of their scores.

    Source:
        DivPrune (arXiv 2503.02175).
    """

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return torch.ones(tokens.projected.shape[:2], device=tokens.projected.device, dtype=torch.float32)

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        features = normalize(tokens.projected.float(), dim=-1)
        cosine = features @ features.mT
        # Two tokens can be each other's nearest and tie for the first place. The matrix is made exactly symmetric, so
        # that rounding does not decide between them.
        cosine = (cosine + cosine.mT) / 2
        return Selection(max_min(1 - cosine, scores, keep))


def max_min(distance: Tensor, weight: Tensor, keep: int) -> Tensor:
    """Choose tokens greedily for max-min diversity.

    The first token is the one farthest from its nearest neighbour. Each next one is the one farthest from the nearest
    of those already chosen. Ties go to the lower index.

    Args:
        distance: [B, N, N] distances, symmetric.
        weight: [B, N], not negative. A token's distance is multiplied by it.
        keep: number of tokens to choose per image.

    Returns:
        [B, keep] distinct indices, in the order of choice.
    """
    batch, count = weight.shape
    rows = torch.arange(batch, device=weight.device)
    itself = torch.eye(count, dtype=torch.bool, device=weight.device)
    nearest = distance.masked_fill(itself, torch.inf).amin(dim=-1)
    order = torch.empty(batch, keep, dtype=torch.long, device=weight.device)
    # Gain of a token at no distance: below every other gain, which is at least 0, and ordered by weight.
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
