"""LLaVA-PruMerge: CLS attention of the last layer chooses centres, keys say what each absorbs (arXiv 2403.15388)."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from qapbench import Pruner, Selection, VisionTokens, pruner, top_k


@pruner("prumerge")
@dataclass(frozen=True)
class PruMerge(Pruner):
    """Each centre i becomes x_i + sum of a_j x_j over its `neighbours` nearest tokens j by key; the rest is summed.

    x are the patches and a their attention from CLS, unscaled; neighbours may be centres too. The budget is
    keep - 1 centres and one token appended: the sum of a_j x_j over all that are no centre. keep=1 is the best centre
    alone. Sensitivity enters where centres are chosen; the weights a stay attention's own.

    Differs from the released code: centres stay in raster order, there they go by attention; their number is given,
    not the share of outliers (interquartile rule) over the batch; fewer tokens than `neighbours` are all absorbed.
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
        """[B, count] ascending."""
        return top_k(scores, count)

    def _weights(self, tokens: VisionTokens, attention: Tensor, centres: Tensor) -> Tensor:
        """[B, K, N]: what each centre takes of every patch; all of itself."""
        keys = normalize(tokens.require("last_keys", "prumerge").float(), dim=-1)
        itself = centres.unsqueeze(-1)
        own = keys.gather(1, itself.expand(-1, -1, keys.shape[-1]))
        cosine = (own @ keys.mT).scatter(2, itself, float("-inf"))
        near = cosine.argsort(dim=-1, descending=True, stable=True)[..., : min(self.neighbours, tokens.count - 1)]
        taken = attention.expand_as(cosine).gather(2, near)
        return cosine.new_zeros(cosine.shape).scatter(2, near, taken).scatter(2, itself, 1.0)
