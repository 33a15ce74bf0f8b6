"""FasterVLM: attention of CLS, top k (arXiv 2412.01818); also registered by its criterion's name."""

from dataclasses import dataclass

from torch import Tensor

from qapbench import Pruner, Selection, VisionTokens, pruner, top_k


@pruner("fastervlm")
@pruner("attention")
@dataclass(frozen=True)
class Attention(Pruner):
    """Keeps the tokens that the vision tower's CLS token attends to most, mean over heads.

    FasterVLM is this and nothing else, so both names are one implementation. Sensitivity is fused with attention.
    """

    needs = frozenset({"cls_attention"})

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return tokens.require("cls_attention", "attention")

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        return Selection(top_k(scores, keep))
