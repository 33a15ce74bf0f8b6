"""FastV: an image is worth half its tokens behind the second layer (arXiv 2403.06764)."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from qapbench import DecoderPruner, Selection, Stage, VisionTokens, pruner, top_k


@pruner("fastv")
@dataclass(frozen=True)
class FastV(DecoderPruner):
    """Behind `layer` layers, keeps the tokens that the prompt's last token attended to most in the last of these.

    Attention is the mean over heads. `keep` is what every later layer sees, at its original position; the first
    `layer` layers see the whole image (at most all but one of them). Sensitivity, of the hidden states there, is fused
    with that attention.

    Differs from the released code: one row of one layer's attention is computed, where that runs the layer a second
    time to get its whole map; the image may stand anywhere, not at 35 to 611, and in a batch.
    """

    needs = frozenset({"query_attention"})
    layer: Annotated[int, Field(ge=1)] = 2

    def stages(self, count: int, keep: int, depth: int) -> list[Stage]:
        return [Stage(min(self.layer, depth - 1), keep)]

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return tokens.require("query_attention", "fastv")

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        return Selection(top_k(scores, keep))
