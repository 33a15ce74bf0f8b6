"""The pruner VTW: in the middle of the decoder all visual tokens leave."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qapbench import DecoderPruner, Selection, Stage, VisionTokens, pruner, top_k


@pruner("vtw")
@dataclass(frozen=True)
class VTW(DecoderPruner):
    """Withdraw all visual tokens before one of the decoder's layers: the layers before it see them all.

    Nothing is left to keep behind that layer, so `keep` is the mean over layers, and decides which layer it is: with N
    tokens per image and D layers, floor(keep * D / N) of them see all tokens, at least one. The release's layer, 15 of
    32, is keep 270 of 576. If `keep` is no whole number of layers, one more layer sees the keep * D mod N tokens that
    have the highest scores, so that the mean is exact: those of the highest sensitivity, and the first ones without a
    sensitivity, because the method tells no tokens apart.

    Two things differ from the released code. It takes the layer as a parameter, 15 by default, or finds it by the
    divergence of the answers of 20 samples, and expects the image at the positions 35 to 611. Positions are always
    kept, as by its default; it can also number them anew.

    Source:
        VTW (arXiv 2405.05803); released code lzhxmu/VTW at a3d8cfc.
    """

    counts = "mean"

    def stages(self, count: int, keep: int, depth: int) -> list[Stage]:
        whole, rest = divmod(keep * depth, count)
        if whole == 0:  # the first layer sees all tokens, whatever the budget is
            whole, rest = 1, 0
        return [Stage(whole, rest), Stage(whole + 1, 0)] if rest and whole + 1 < depth else [Stage(whole, rest)]

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return torch.ones(tokens.projected.shape[:2], device=tokens.projected.device, dtype=torch.float32)

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        return Selection(top_k(scores, keep))
