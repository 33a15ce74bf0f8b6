"""The pruner LLaVA-PruMerge: tokens are chosen by attention, and each absorbs the tokens with similar keys."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from qapbench import Pruner, Selection, VisionTokens, pruner, top_k


@pruner("prumerge")
@dataclass(frozen=True)
class PruMerge(Pruner):
    """Keep the tokens with most CLS attention as cluster centres, and merge the other tokens into them.

    The attention is that of the vision tower's last layer. Centre i becomes x_i + sum_j a_j x_j, where x are the
    patches, a is the attention from CLS to each patch, not rescaled, and j are the tokens whose keys are most similar
    to the centre's; other centres may be among them. One more token is appended: the sum of a_j x_j over all tokens
    that are not centres. The budget is keep - 1 centres and this token. With keep=1 it is the best centre alone.
    Sensitivity enters the choice of centres, but not the weights a.

    Three things differ from the released code. Centres stay in raster order instead of being sorted by attention. Their
    number is given by the budget instead of being the number of outliers in attention (interquartile rule) over the
    batch. In an image with fewer tokens than `neighbours`, each centre absorbs all others.

    Attributes:
        neighbours: number of tokens that each centre absorbs. The release has 32.

    Source:
        LLaVA-PruMerge (arXiv 2403.15388).
    """

    needs = frozenset({"last_cls_attention", "last_keys", "patches"})
    neighbours: Annotated[int, Field(ge=1)] = 32

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return tokens.require("last_cls_attention", "prumerge")

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        patches = tokens.require("patches", "prumerge").float()
        attention = tokens.require("last_cls_attention", "prumerge").float().unsqueeze(1)
        centres = self.centres(scores, max(keep - 1, 1))
        updated = self._weights(tokens, attention, centres) @ patches
        if keep == 1:
            return Selection(centres, space="patches", updated=updated)
        outside = ~Selection(centres).mask(tokens.count).unsqueeze(1)
        return Selection(centres, (attention * outside) @ patches, "patches", updated=updated)

    def centres(self, scores: Tensor, count: int) -> Tensor:
        """Choose `count` centres by the scores [B, N]. Returns their indices [B, count], ascending."""
        return top_k(scores, count)

    def _weights(self, tokens: VisionTokens, attention: Tensor, centres: Tensor) -> Tensor:
        """Compute the weight of every patch in each centre: [B, K, N]. The weight of the centre itself is 1."""
        keys = normalize(tokens.require("last_keys", "prumerge").float(), dim=-1)
        itself = centres.unsqueeze(-1)
        own = keys.gather(1, itself.expand(-1, -1, keys.shape[-1]))
        cosine = (own @ keys.mT).scatter(2, itself, float("-inf"))
        near = cosine.argsort(dim=-1, descending=True, stable=True)[..., : min(self.neighbours, tokens.count - 1)]
        taken = attention.expand_as(cosine).gather(2, near)
        return cosine.new_zeros(cosine.shape).scatter(2, near, taken).scatter(2, itself, 1.0)
