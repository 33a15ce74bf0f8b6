"""The pruner FasterVLM, registered under its own name and under that of its criterion, attention."""

from dataclasses import dataclass

from torch import Tensor

from qapbench import Pruner, Selection, VisionTokens, pruner, top_k


@pruner("fastervlm")
@pruner("attention")
@dataclass(frozen=True)
class Attention(Pruner):
    """Keep the tokens that the vision tower's CLS token attends to most.

    The attention is the mean over heads. This is all that FasterVLM does, so `attention` and `fastervlm` are two names
    of one implementation. Sensitivity is fused with the attention.

    Source:
        FasterVLM (arXiv 2412.01818).
    """

    needs = frozenset({"cls_attention"})

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return tokens.require("cls_attention", "attention")

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        return Selection(top_k(scores, keep))
