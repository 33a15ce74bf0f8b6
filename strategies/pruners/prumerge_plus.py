"""The pruner LLaVA-PruMerge+: PruMerge with additional centres that are spread evenly over the image."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qapbench import Fraction, Selection, pruner, top_k

from .prumerge import PruMerge


@pruner("prumerge_plus")
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """Merge like `prumerge`, into centres of which some are chosen by score and the others lie evenly over the image.

    At least one centre is chosen by score. Sensitivity enters there.

    Besides what `prumerge` changes, one thing differs from the released code. It samples the image at a stride made for
    576 tokens and skips tokens that are centres already; its training code does not skip them, and a token may come
    twice. Here the samples are spread evenly, in raster order, over the tokens that were not chosen by score, so that
    their number is exact.

    Attributes:
        spatial: share of the centres that are spread evenly over the image. The released evaluation code has 3/4, the
            released training code 1/2.

    Source:
        LLaVA-PruMerge (arXiv 2403.15388), the variant PruMerge+.
    """

    spatial: Fraction = 0.75

    def centres(self, scores: Tensor, count: int) -> Tensor:
        samples = min(round(count * self.spatial), count - 1)
        best = top_k(scores, count - samples)
        left = (~Selection(best).mask(scores.shape[1])).nonzero()[:, 1].view(len(scores), -1)
        places = torch.arange(samples, device=scores.device) * left.shape[1] // max(samples, 1)
        return torch.cat([best, left[:, places]], dim=1).sort(dim=-1).values
