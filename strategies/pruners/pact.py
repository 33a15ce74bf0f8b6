"""The pruner PACT: unimportant tokens are dropped in the decoder, and the others are clustered by their keys."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from qapbench import DecoderPruner, Fraction, Selection, Stage, VisionTokens, pruner, top_k

WIDTH = 2.0  # of the kernel that densities are measured with, as in the released code
DIGITS = 9  # decimals that densities are compared to, so that the order of their terms does not break a tie
STEPS = 40  # halvings of the range in which the cutoff is searched


@pruner("pact")
@dataclass(frozen=True)
class PACT(DecoderPruner):
    """Prune by importance, cluster what is left, and let each cluster be the mean of its tokens.

    The importance of a token is its L2 norm times the attention that the mean query of everything up to the image's
    last token pays to it, without rotary embedding and mask, in the layer behind the drop. floor(important * N) tokens
    stay, at least `keep`. They are clustered by the keys of that layer after the rotary embedding, all heads side by
    side, with the cosine distance d (see `centres_at`). Each joins its nearest centre, and so does a dropped token
    within `recovery` * cutoff of it. A centre's new hidden state is the mean of its cluster; it stays at its position.
    Sensitivity is computed on the hidden states at the drop and fused with the importance.

    Two things differ from the released code. Its number of clusters follows from the cutoff; here there are exactly
    `keep`: the cutoff that is given is taken if it leads to them, and else one is searched by halving that leads to
    `keep` or as little less as possible, and the tokens farthest from all centres become centres too. Attention behind
    the drop is not made proportional to the size of clusters. What the release decides and the paper leaves open: the
    mean query and not single ones, densities replaced by their ranks, centres found in the order of density.

    Attributes:
        layer: number of decoder layers that see the whole image. The release has 4. In a decoder with no more layers
            than this, the drop comes before the last layer.
        important: share of the tokens that is clustered. The release has 0.55.
        cutoff: cosine distance within which a denser token is no centre. The release has 0.21 for LLaVA-OneVision.
        recovery: distance of the centre within which a dropped token is recovered, as a multiple of the cutoff.

    Source:
        PACT (arXiv 2504.08966); released code orailix/PACT at cf9a0c9.
    """

    needs = frozenset({"context_attention", "rotated_keys"})
    ahead = True
    layer: Annotated[int, Field(ge=1)] = 4
    important: Fraction = 0.55
    cutoff: Annotated[float, Field(ge=0, le=2)] = 0.21
    recovery: Annotated[float, Field(ge=0)] = 1.5

    def stages(self, count: int, keep: int, depth: int) -> list[Stage]:
        return [Stage(min(self.layer, depth - 1), keep)]

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return tokens.require("context_attention", "pact").float() * tokens.projected.float().norm(dim=-1)

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        important = top_k(scores, max(int(tokens.count * self.important), keep))
        keys = normalize(tokens.require("rotated_keys", "pact").double(), dim=-1)
        images = zip(important, keys, tokens.projected.float(), strict=True)
        return Selection.stack([self._image(*image, keep) for image in images])

    def _image(self, important: Tensor, keys: Tensor, hidden: Tensor, keep: int) -> Selection:
        """The selection of one image.

        Args:
            important: [n] indices of the tokens to cluster, ascending.
            keys: [N, H] keys, normalised.
            hidden: [N, D] hidden states.
            keep: number of clusters.
        """
        distance = (1 - keys @ keys[important].T).clamp(min=0)  # [N, n]
        distance[important, torch.arange(len(important), device=keys.device)] = 0
        found, cutoff = centres_at(distance[important], keep, self.cutoff)
        centres = important[found.to(keys.device)].sort().values
        nearest = (1 - keys @ keys[centres].T).clamp(min=0).min(dim=-1)
        joins = nearest.values <= self.recovery * cutoff
        joins[important] = True
        own = nearest.indices.scatter(0, centres, torch.arange(keep, device=keys.device))
        members = one_hot(own, keep).to(hidden) * joins.unsqueeze(1)
        size = members.sum(dim=0)
        mean = (members.T @ hidden) / size.unsqueeze(1)
        return Selection(centres.unsqueeze(0), updated=mean.unsqueeze(0), made=(size > 1).unsqueeze(0))


def centres_at(distance: Tensor, keep: int, cutoff: float) -> tuple[Tensor, float]:
    """Find `keep` centres among tokens by density peaks with a cutoff (DBDPC), and the cutoff that led to them.

    The density of a token is the sum over all tokens of exp(-(d / 2)^2). By falling density, ties by index, each token
    becomes a centre that has no centre within the cutoff.

    Args:
        distance: [n, n] distances, at most 2 each.
        keep: number of centres, at most n.
        cutoff: cutoff that is tried first.
    """
    density = (-(distance / WIDTH).square()).exp().sum(dim=1)
    order = density.round(decimals=DIGITS).argsort(descending=True, stable=True)
    sorted_ = distance[order][:, order].cpu()
    low, high, found = 0.0, 2.0, [0]
    best = high
    for _ in range(STEPS):
        tried = _peaks(sorted_, cutoff, keep + 1)
        if len(tried) <= keep:
            high, best, found = cutoff, cutoff, tried
        else:
            low = cutoff
        if len(tried) == keep:
            break
        cutoff = (low + high) / 2
    while len(found) < keep:
        found.append(int(sorted_[found].amin(dim=0).index_fill(0, torch.tensor(found), -1.0).argmax()))
    return order.cpu()[found], best


def _peaks(distance: Tensor, cutoff: float, most: int) -> list[int]:
    """The first `most` centres among tokens that are sorted by falling density, from their distances [n, n]."""
    free, far = torch.ones(len(distance), dtype=torch.bool), distance > cutoff
    found: list[int] = []
    while len(found) < most and bool(free.any()):
        found.append(int(free.int().argmax()))
        free &= far[found[-1]]
    return found
