"""LLaVA-PruMerge+: PruMerge whose centres are joined by spatially uniform samples (arXiv 2403.15388)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qapbench import Fraction, Selection, pruner, top_k

from .prumerge import PruMerge


@pruner("prumerge_plus")
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """As PruMerge, but `spatial` of the centres are every so-many-th token in raster order, and the others by score.

    Three of four is the proportion of the released evaluation code (its training code has one of two). At least one
    centre is chosen by score, and there sensitivity enters.

    Differs from the released code, which samples all places at a stride for 576 tokens and skips those chosen already
    (in training it does not skip, and a token may come twice): ours spreads its samples evenly over the tokens not
    chosen by score, so that their number is exact.
    """

    spatial: Fraction = 0.75

    def centres(self, scores: Tensor, count: int) -> Tensor:
        samples = min(round(count * self.spatial), count - 1)
        best = top_k(scores, count - samples)
        left = (~Selection(best).mask(scores.shape[1])).nonzero()[:, 1].view(len(scores), -1)
        places = torch.arange(samples, device=scores.device) * left.shape[1] // max(samples, 1)
        return torch.cat([best, left[:, places]], dim=1).sort(dim=-1).values
