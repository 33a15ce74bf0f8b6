"""The pruner SCOPE: tokens that cover the image's other tokens, weighted by the attention of CLS."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from qapbench import Pruner, Selection, VisionTokens, pruner

from .coverage import greedy_coverage
from .scale import on_the_scale_of


@pruner("scope")
@dataclass(frozen=True)
class Scope(Pruner):
    """Keep salient tokens that cover the image: greedy facility location with CLS attention as weight.

    Each next token j is the one with the highest gain_j * a_j^alpha, where gain_j is the sum over all tokens i of
    max(0, cos(x_i, x_j) - c_i) and c_i is the highest cosine of i with a token chosen before, at least 0. x are the
    patches before the projector. a is the CLS token's attention in the layer whose output the projector takes, summed
    over heads; if there is a sensitivity, it is fused with it, on the attention's scale.

    One thing differs from the released code: each tile has a budget of its own, where the release divides one budget by
    the number of tiles. What the release decides and the paper leaves open: heads are summed, which counts only for
    "add", and a negative cosine covers nothing.

    Attributes:
        alpha: exponent of the attention. The release has 1.
        combine: "multi" is gain_j * a_j^alpha, the release's default; "add" is gain_j + a_j^alpha.

    Source:
        SCOPE (arXiv 2510.24214); released code kinredon/SCOPE at 6bf7306.
    """

    needs = frozenset({"cls_attention", "patches"})
    alpha: Annotated[float, Field(ge=0)] = 1.0
    combine: Literal["multi", "add"] = "multi"

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return tokens.require("cls_attention", "scope")

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        attention = on_the_scale_of(tokens.require("cls_attention", "scope"), scores)
        features = normalize(tokens.require("patches", "scope").float(), dim=-1)
        cosine = features @ features.mT
        if self.combine == "add":
            weight = (attention * tokens.heads) ** self.alpha
            return Selection(greedy_coverage(cosine, keep, lambda gains: gains + weight))
        weight = attention**self.alpha
        return Selection(greedy_coverage(cosine, keep, lambda gains: gains * weight))
