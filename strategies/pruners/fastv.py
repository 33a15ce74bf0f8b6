"""The pruner FastV: tokens are dropped once, after an early layer of the decoder."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from qapbench import DecoderPruner, Selection, Stage, VisionTokens, pruner, top_k


@pruner("fastv")
@dataclass(frozen=True)
class FastV(DecoderPruner):
    """Keep the tokens that the prompt's last token attends to most in an early layer of the decoder.

    The attention is the mean over heads in the last layer before the drop. All layers after the drop see `keep` tokens
    per image, at their original positions; the layers before it see the whole image. Sensitivity is computed on the
    hidden states at the drop and fused with the attention.

    Two things differ from the released code. It runs the layer a second time to get the whole attention map; here only
    the row that is read is computed. It expects the image at positions 35 to 611; here the image may be anywhere in the
    prompt, and prompts may be batched.

    Attributes:
        layer: number of decoder layers that see the whole image. The paper drops after 2. In a decoder with no more
            layers than this, the drop comes before the last layer.

    Source:
        FastV (arXiv 2403.06764).
    """

    needs = frozenset({"query_attention"})
    layer: Annotated[int, Field(ge=1)] = 2

    def stages(self, count: int, keep: int, depth: int) -> list[Stage]:
        return [Stage(min(self.layer, depth - 1), keep)]

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return tokens.require("query_attention", "fastv")

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        return Selection(top_k(scores, keep))
