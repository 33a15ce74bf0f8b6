"""The pruner HiPrune: objects are found in a middle layer of the vision tower, global context in a deep one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qapbench import Fraction, Pruner, Selection, VisionTokens, pruner, top_k


@pruner("hiprune")
@dataclass(frozen=True)
class HiPrune(Pruner):
    """Keep anchor tokens with their neighbours, and fill the rest of the budget with register tokens.

    Anchors are the tokens that receive most attention in a middle layer of the vision tower. Buffers are the four
    neighbours of each anchor on the grid of tokens. Registers are the tokens with the highest scores among the others:
    the attention received in the layer whose output the projector takes, fused with sensitivity. Sensitivity does not
    enter the choice of anchors.

    One thing differs from the released code. It takes the neighbours at the index offsets -1, +1, -24 and +24 and
    clamps them to 0..575; here neighbours follow the grid and do not wrap around its rows.

    Attributes:
        alpha: share of the budget for anchors and buffers together, which is round(keep * alpha / 5) anchors, at most
            keep / 5. The release has 0.1, which gives no anchors if keep is 25 or less.

    Source:
        HiPrune (arXiv 2508.00553).
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
    """Add to the places set in `mask` those to the left, to the right, above and below: [B, H, W] bool, same shape."""
    wide = mask.clone()
    wide[:, :, 1:] |= mask[:, :, :-1]
    wide[:, :, :-1] |= mask[:, :, 1:]
    wide[:, 1:] |= mask[:, :-1]
    wide[:, :-1] |= mask[:, 1:]
    return wide
