"""PyramidDrop: fewer tokens from stage to stage of the decoder (arXiv 2410.17247)."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from qapbench import DecoderPruner, Selection, Stage, VisionTokens, even_stages, pruner, top_k


@pruner("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(DecoderPruner):
    """At the end of each of `drops` equal parts of the decoder, keeps the same share of the tokens that are left.

    Ranked by the attention that the prompt's last token would pay in the layer that comes next, mean over heads.
    `keep` is what the last part sees: keep = count / 8 is the released schedule, half at a time behind 8, 16 and 24 of
    32 layers. Sensitivity, of the hidden states at each stage, is fused with that attention.

    Differs from the released code, which numbers positions anew at each stage: tokens keep theirs.
    """

    needs = frozenset({"query_attention"})
    ahead = True
    drops: Annotated[int, Field(ge=1)] = 3

    def stages(self, count: int, keep: int, depth: int) -> list[Stage]:
        parts = self.drops + 1
        return even_stages([depth * part / parts for part in range(1, parts)], count, keep, depth)

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return tokens.require("query_attention", "pyramiddrop")

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        return Selection(top_k(scores, keep))
