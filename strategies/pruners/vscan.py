"""The pruner VScan: details are found in windows of the image, context in the whole of it, and the rest is merged."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from qapbench import Fraction, Pruner, Selection, VisionTokens, pruner, top_k


@pruner("vscan")
@dataclass(frozen=True)
class VScan(Pruner):
    """Keep tokens of most CLS attention, half of them spread over windows, and merge every other into the nearest.

    floor(keep / 2) tokens are local: by falling attention of CLS in a shallow layer of the tower, but from each window
    of the grid no more than its equal share, rounded up. The others are global: those of the highest score among the
    rest, which is the attention of CLS in the layer whose output the projector takes, fused with sensitivity. Each
    token that is not kept is added to the kept one of the highest cosine after the projector, and sums are divided by
    their numbers.

    This is the first of VScan's two stages, in front of the decoder; `vscan_decoder` is the second one by itself, and
    `vscan_two_stage` has both.

    Two things differ from the released code. Its LLaVA version takes floor(floor(keep / 2) / windows) tokens from each
    window and falls short of `keep` (68 of 72) or fails below 32; here the budget is exact, by the rule of its Qwen
    version, and where windows are too small for their share, it is raised for all. A grid smaller than a window is one
    window. What the release decides and the paper leaves open: heads are averaged, local tokens are chosen first, rows
    and columns that fill no window belong to the last one, and merged tokens weigh as much as the kept one.

    Attributes:
        window: side of a window in tokens. The release has 6 for LLaVA-1.5 (4 x 4 windows) and 4 for Qwen2.5-VL.
        local: share of the budget for local tokens. The release has 0.5.

    Source:
        VScan (arXiv 2505.22654); released code Tencent/SelfEvolvingAgent at a82450e, folder VScan.
    """

    needs = frozenset({"cls_attention", "shallow_cls_attention", "grid"})
    optional = frozenset({"grid"})
    window: Annotated[int, Field(ge=1)] = 6
    local: Fraction = 0.5

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return tokens.require("cls_attention", "vscan")

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        shallow = tokens.require("shallow_cls_attention", "vscan").float()
        of = windows(tokens.grid or (1, tokens.count), self.window).to(scores.device)
        details = Selection(spread(shallow, of, int(keep * self.local))).mask(tokens.count)
        kept = top_k(scores.masked_fill(details, torch.inf), keep)
        return Selection(kept, updated=absorbed(tokens.projected.float(), kept))


def windows(grid: tuple[int, int], side: int) -> Tensor:
    """The window of each token of a grid (height, width): [height * width]. Windows are squares with that side.

    Rows and columns that fill no window of their own belong to the last one.
    """
    down, across = ((torch.arange(size) // side).clamp(max=max(size // side, 1) - 1) for size in grid)
    return (down.unsqueeze(1) * (int(across[-1]) + 1) + across).flatten()


def spread(scores: Tensor, of: Tensor, keep: int) -> Tensor:
    """The `keep` highest scores [B, N] if each window may give no more than an equal share: [B, keep].

    The share is keep / windows, rounded up, or the least number above it with which there are enough tokens.

    Args:
        scores: [B, N].
        of: [N] window of each token.
        keep: number of tokens.
    """
    held = one_hot(of).sum(dim=0)
    share = -(-keep // len(held))
    while int(held.clamp(max=share).sum()) < keep:
        share += 1
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranked = of[order]
    place = one_hot(ranked).cumsum(dim=1).gather(2, ranked.unsqueeze(-1)).squeeze(-1)  # of each in its window, from 1
    return order.gather(1, (place > share).int().argsort(dim=-1, stable=True)[:, :keep])


def absorbed(features: Tensor, kept: Tensor) -> Tensor:
    """The kept tokens after each of the others was merged into the most similar one, as a mean: [B, K, D].

    Args:
        features: [B, N, D] all tokens.
        kept: [B, K] indices of the kept ones, ascending.
    """
    unit, index = normalize(features, dim=-1), kept.unsqueeze(-1).expand(-1, -1, features.shape[-1])
    nearest = (unit @ unit.gather(1, index).mT).argmax(dim=-1)
    itself = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    members = one_hot(nearest.scatter(1, kept, itself), kept.shape[1]).to(features.dtype)
    return (members.mT @ features) / members.sum(dim=1).unsqueeze(-1)
