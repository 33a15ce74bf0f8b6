"""The pruner HoloV: the budget is dealt to parts of the image, so that none is forgotten."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from qapbench import Pruner, Selection, VisionTokens, pruner, top_k

from .scale import on_the_scale_of

SCALE = 1000.0  # factor of the attention
TINY = 1e-6  # keeps quotients finite, as in the released code


@pruner("holov")
@dataclass(frozen=True)
class HoloV(Pruner):
    """Deal the budget to runs of consecutive tokens, and keep in each run the tokens with most CLS attention.

    The score of a token is 1000 a + context * v * mean(1000 a) / mean(v), with the means over its run: a is the CLS
    token's attention, v the variance of the token's cosines with the other tokens of the run, after the projector. A
    run gets floor(w K) tokens, where w is its share of the sum of the runs' mean scores; what is left goes to the
    heaviest runs, one each. Sensitivity is fused with the attention, on its scale, and thus counts for both.

    Two things differ from the released code. If a run is dealt more than it holds, the rest goes to the heaviest other
    runs, one each in turn; the release loses it and fills up with zeros. Tokens stand by position, where the release
    hands them on by falling attention within a run. What the release decides and the paper leaves open: the parts are
    runs in raster order and not squares, of which the first N mod `runs` are longer by one; a run of one token scores a
    without the factor; as v is scaled to the mean of the attention, it hardly moves the runs' shares, and within a run
    attention alone counts.

    Attributes:
        runs: number of runs. The release has 16 for LLaVA, and 1024 / 576 * N / keep for Qwen2.5-VL.
        context: weight of the variance. The release has 0.09.

    Source:
        HoloV (arXiv 2510.02912); released code obananas/HoloV at 1d2e65e.
    """

    needs = frozenset({"cls_attention"})
    runs: Annotated[int, Field(ge=1)] = 16
    context: Annotated[float, Field(ge=0)] = 0.09

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return tokens.require("cls_attention", "holov")

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        attention = on_the_scale_of(tokens.require("cls_attention", "holov"), scores)
        pairs = zip(attention, tokens.projected.float(), strict=True)
        return Selection(torch.stack([self._image(*image, keep) for image in pairs]))

    def _image(self, attention: Tensor, features: Tensor, keep: int) -> Tensor:
        """The tokens [keep] of one image, from its attention [N] and features [N, D]."""
        runs = min(self.runs, len(attention))
        parts, shown = attention.tensor_split(runs), features.tensor_split(runs)
        worth = torch.stack([self._worth(*run) for run in zip(parts, shown, strict=True)])
        kept, start = [], 0
        for part, share in zip(parts, deal(worth, [len(part) for part in parts], keep), strict=True):
            kept.append(start + top_k(part.unsqueeze(0), share)[0])
            start += len(part)
        return torch.cat(kept)

    def _worth(self, attention: Tensor, features: Tensor) -> Tensor:
        """The mean score of a run, from its attention [n] and features [n, D]."""
        others = len(attention) - 1
        if others == 0:
            return attention.mean()
        unit = features / (features.norm(dim=-1, keepdim=True) + TINY)
        cosine = (unit @ unit.T).fill_diagonal_(0)
        mean = cosine.sum(dim=-1, keepdim=True) / others
        variance = (cosine - mean).square().sum(dim=-1) / others
        salience = SCALE * attention
        return (salience + self.context * variance * salience.abs().mean() / (variance.abs().mean() + TINY)).mean()


def deal(worth: Tensor, sizes: list[int], keep: int) -> list[int]:
    """Deal `keep` tokens to runs in proportion to their worth, none more than it holds.

    Args:
        worth: [P] worth of each run, not negative.
        sizes: number of tokens of each run, together at least `keep`.
        keep: number of tokens.
    """
    floors = (worth / (worth.sum() + TINY) * keep).floor().long().tolist()
    shares = [min(share, size) for share, size in zip(floors, sizes, strict=True)]
    heaviest = worth.argsort(descending=True, stable=True).tolist()
    while sum(shares) < keep:
        for run in heaviest:
            if shares[run] < sizes[run] and sum(shares) < keep:
                shares[run] += 1
    return shares
