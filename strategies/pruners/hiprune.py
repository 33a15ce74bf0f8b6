"""HiPrune: objects from a middle layer of the vision tower, the whole from a deep one (arXiv 2508.00553)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qapbench import Fraction, Pruner, Selection, VisionTokens, pruner, top_k


@pruner("hiprune")
@dataclass(frozen=True)
class HiPrune(Pruner):
    """Anchors receive most attention in the middle layer, buffers are their four neighbours, registers fill the rest.

    Anchors and buffers together get the share `alpha` of the budget: round(keep * alpha / 5) anchors, so none where
    keep is below 25, and never more than fit. Registers are by score: the attention received in the layer whose
    output the projector takes, fused with sensitivity, which enters here and not among anchors.

    Differs from the released code, which finds neighbours at -1, +1, -24 and +24 and clamps them to 0..575: ours
    follow the grid and do not wrap around its rows.
    """

    needs = frozenset({"attention_received", "middle_attention_received", "grid"})
    alpha: Fraction = 0.1

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return tokens.require("attention_received", "hiprune")

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        anchors = min(round(keep * self.alpha / 5), keep // 5)
        middle = tokens.require("middle_attention_received", "hiprune").float()
        height, width = tokens.grid or (1, tokens.count)
        objects = with_neighbours(Selection(top_k(middle, anchors)).mask(tokens.count).view(-1, height, width))
        return Selection(top_k(scores.masked_fill(objects.flatten(1), torch.inf), keep))


def with_neighbours(mask: Tensor) -> Tensor:
    """[B, H, W] bool: the places set, and those left, right, above and below them."""
    wide = mask.clone()
    wide[:, :, 1:] |= mask[:, :, :-1]
    wide[:, :, :-1] |= mask[:, :, 1:]
    wide[:, 1:] |= mask[:, :-1]
    wide[:, :-1] |= mask[:, 1:]
    return wide
