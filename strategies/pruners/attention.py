"""CLS attention, top k (FasterVLM's criterion)."""

from dataclasses import dataclass

from torch import Tensor

from qapbench import Pruner, Selection, VisionTokens, pruner, top


@pruner("attention")
@dataclass(frozen=True)
class Attention(Pruner):
    """Keeps the tokens that the vision tower's CLS token attends to most."""

    needs = frozenset({"cls_attention"})

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return tokens.require("cls_attention", "attention")

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        return Selection(top(scores, keep))
