"""The pruner ToMe: pairs of similar tokens are merged until `keep` are left."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qapbench import Pruner, Selection, VisionTokens, pruner


@pruner("tome")
@dataclass(frozen=True)
class ToMe(Pruner):
    """Merge tokens by bipartite soft matching, in as few steps as lead to the budget.

    In each step every second token of the list, from the first one on, looks for the token among the others whose key
    is most similar. The r pairs of the highest cosine are merged: features and keys become their means, weighted by the
    number of tokens that each stands for. A step merges at most half of the list. Keys are those of the layer whose
    output the projector takes, averaged over heads; what is merged are projected tokens. A merged token stands at the
    place of the token that was looked for. The method has no relevance; if there is a sensitivity, the cosine distance
    of a pair is multiplied by the score of the token that would merge into the other, and a merged token has the higher
    score of the two, which the published method does not do.

    Two things differ from the released code. It merges a fixed number of tokens in every layer of a vision transformer,
    with keys of that layer, and adds the logarithm of sizes to its attention; here tokens are merged in front of the
    decoder, whose attention is left as it is. Tokens stand by position. What the release decides and the paper leaves
    open: tokens that did not merge go to the front of the list, by falling similarity, which decides the next step's
    sides.

    Source:
        ToMe (arXiv 2210.09461); released code facebookresearch/ToMe at af95e4b (CC BY-NC; nothing is taken from it).
    """

    needs = frozenset({"keys"})

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return torch.ones(tokens.projected.shape[:2], device=tokens.projected.device, dtype=torch.float32)

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        features = tokens.projected.float()
        keys = tokens.require("keys", "tome").double().unflatten(-1, (tokens.heads, -1)).mean(dim=-2)
        size = torch.ones_like(scores)
        place = torch.arange(tokens.count, device=scores.device).expand_as(scores)
        while (excess := features.shape[1] - keep) > 0:
            pairs = match(keys, scores, min(excess, features.shape[1] // 2))
            features, keys = (pairs.mean(values, size) for values in (features, keys))
            scores = pairs.reduced(scores, "amax")
            size, place = pairs.reduced(size, "sum"), pairs.left(place)
        order = place.argsort(dim=-1)
        updated = features.gather(1, order.unsqueeze(-1).expand_as(features))
        return Selection(place.gather(1, order), updated=updated, made=size.gather(1, order) > 1)


class Pairs(NamedTuple):
    """Tokens of a list that merge. Those at even places are one side of the matching, those at odd places the other.

    Attributes:
        stay: [B, S] even tokens that do not merge, counted among the even ones, in the order of the new list.
        source: [B, R] even tokens that merge, counted among the even ones.
        target: [B, R] odd token that each of these merges into, counted among the odd ones.
    """

    stay: Tensor
    source: Tensor
    target: Tensor

    def left(self, values: Tensor) -> Tensor:
        """Values [B, N] of the tokens that the new list consists of: [B, N - R]. Those that merged are left out."""
        return torch.cat([values[:, ::2].gather(1, self.stay), values[:, 1::2]], dim=1)

    def reduced(self, values: Tensor, how: str) -> Tensor:
        """Values [B, N] of the new list: those of a token and of what merged into it, reduced as torch names it."""
        merging = values[:, ::2].gather(1, self.source)
        other = values[:, 1::2].scatter_reduce(1, self.target, merging, how)
        return torch.cat([values[:, ::2].gather(1, self.stay), other], dim=1)

    def mean(self, values: Tensor, size: Tensor) -> Tensor:
        """Vectors [B, N, D] of the new list: means weighted by size [B, N] of tokens and of what merged into them."""
        even, odd = values[:, ::2], values[:, 1::2]
        stay, source, target = (x.unsqueeze(-1).expand(-1, -1, values.shape[-1]) for x in self)
        weights, whole = size.to(values).unsqueeze(-1), self.reduced(size.to(values), "sum").unsqueeze(-1)
        merging = even.gather(1, source) * weights[:, ::2].gather(1, source[..., :1])
        total = (odd * weights[:, 1::2]).scatter_add(1, target, merging)
        return torch.cat([even.gather(1, stay), total / whole[:, stay.shape[1] :]], dim=1)


def match(keys: Tensor, worth: Tensor, count: int) -> Pairs:
    """Find the pairs of tokens that merge.

    Args:
        keys: [B, N, D] vectors that are compared.
        worth: [B, N] factor of the distance of a token that would merge into another. The pairs of the lowest products
            merge; ties go to the lower index.
        count: number of pairs, at most half of N, rounded down.
    """
    unit = normalize(keys, dim=-1)
    cosine, target = (unit[:, ::2] @ unit[:, 1::2].mT).max(dim=-1)
    order = ((1 - cosine).clamp(min=0) * worth[:, ::2]).argsort(dim=-1, stable=True)
    source = order[:, :count]
    return Pairs(order[:, count:], source, target.gather(1, source))
