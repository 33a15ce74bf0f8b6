"""The pruner PyramidDrop: tokens are dropped in several stages of the decoder."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from qapbench import DecoderPruner, Selection, Stage, VisionTokens, even_stages, pruner, top_k


@pruner("pyramiddrop")
@dataclass(frozen=True)
class PyramidDrop(DecoderPruner):
    """Keep the same fraction of the remaining tokens at each of several stages of the decoder.

    The drops cut the decoder into parts of equal depth. At each drop the tokens stay that the prompt's last token would
    attend to most in the layer after it; the attention is the mean over heads. The last part of the decoder sees `keep`
    tokens per image. Sensitivity is computed on the hidden states at each drop and fused with the attention.

    One thing differs from the released code: tokens keep their positions, while it numbers them anew at each stage.

    Attributes:
        drops: number of drops, which cut the decoder into drops + 1 parts. The release has 3: after 8, 16 and 24 of 32
            layers. With keep = count / 8, each of them halves the tokens as in the release.

    Source:
        PyramidDrop (arXiv 2410.17247).
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
