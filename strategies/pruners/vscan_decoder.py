"""The second stage of the pruner VScan, inside the decoder."""

from dataclasses import dataclass

from torch import Tensor

from qapbench import DecoderPruner, Fraction, Selection, Stage, VisionTokens, pruner, top_k


@pruner("vscan_decoder")
@dataclass(frozen=True)
class VScanDecoder(DecoderPruner):
    """Keep the tokens that the prompt's last token attends to most in the middle of the decoder: VScan's second stage.

    The attention is that of the layer behind the drop, averaged over heads. Sensitivity is computed on the hidden
    states at the drop and fused with it.

    Two things differ from the released code. The release prunes in front of the decoder too, to 96 tokens there and 32
    here: `vscan_two_stage` has both stages, and `vscan` the first one. Tokens keep their positions, where the release
    numbers them anew.

    Attributes:
        depth: fraction of the decoder's layers that see all tokens. The release has 16 of 32 for LLaVA-1.5, and 14 of
            28 for Qwen2.5-VL.

    Source:
        VScan (arXiv 2505.22654); released code Tencent/SelfEvolvingAgent at a82450e, folder VScan.
    """

    needs = frozenset({"query_attention"})
    ahead = True
    depth: Fraction = 0.5

    def stages(self, count: int, keep: int, depth: int) -> list[Stage]:
        return [Stage(min(max(round(depth * self.depth), 1), depth - 1), keep)]

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return tokens.require("query_attention", "vscan_decoder")

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        return Selection(top_k(scores, keep))
