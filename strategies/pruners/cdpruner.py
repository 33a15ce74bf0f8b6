"""CDPruner: conditional diversity by a determinantal point process (arXiv 2506.10967)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qapbench import Pruner, Selection, VisionTokens, pruner

RANK_TOLERANCE = 1e-6  # of a unit vector's squared residual: float32 cannot tell less from zero


@pruner("cdpruner")
@dataclass(frozen=True)
class CDPruner(Pruner):
    """Greedy MAP of a DPP with kernel K_ij = r_i cos(f_i, f_j) r_j, on projected features f.

    r is the score: the relevance of the question, fused with the sensitivity where there is one.

    Attributes:
        relevance_sign: relevance is -cos(image, text) in the released code, an empirical fact about OpenAI's
            CLIP; "positive" is for towers whose patches were aligned with text.

    Differs from the released code in two places: scores are normalised per image, not over the batch; and past the
    kernel's rank, where the released code divides by zero, the rest is filled by score.
    """

    needs = frozenset({"image_embeds", "text_embeds"})
    relevance_sign: Literal["negative", "positive"] = "negative"

    def relevance(self, tokens: VisionTokens) -> Tensor:
        image = normalize(tokens.require("image_embeds", "cdpruner").float(), dim=-1)
        text = normalize(tokens.require("text_embeds", "cdpruner").float(), dim=-1)
        cosine = (image @ text.mT).mean(dim=-1)
        return cosine if self.relevance_sign == "positive" else -cosine

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        features = normalize(tokens.projected.float(), dim=-1)
        return Selection(greedy_map(features @ features.mT, scores, keep))


def greedy_map(cosine: Tensor, quality: Tensor, keep: int) -> Tensor:
    """Greedy MAP inference (Chen et al. 2018) of the DPP with kernel q_i S_ij q_j.

    The gain of a token is q_i^2 times the squared residual of its unit vector outside the span of those chosen, so
    quality stays out of the recursion and a quality of zero is harmless. Ties go to the lower index; tokens without
    residual left are taken in order of quality.

    Args:
        cosine: [B, N, N] similarity of unit vectors.
        quality: [B, N], not negative.

    Returns:
        [B, keep] distinct indices in the order of choice.
    """
    batch, count = quality.shape
    rows = torch.arange(batch, device=quality.device)
    weight = quality * quality
    residual = cosine.diagonal(dim1=-2, dim2=-1).clone()
    basis = cosine.new_zeros(batch, keep, count)
    order = torch.empty(batch, keep, dtype=torch.long, device=quality.device)
    # Below every gain (>= 0), and ordered by quality: what an exhausted token is worth.
    spent = quality - quality.amax(dim=-1, keepdim=True) - 1
    for step in range(keep):
        gain = torch.where(residual > RANK_TOLERANCE, weight * residual, spent)
        chosen = gain.argmax(dim=-1)
        order[:, step] = chosen
        if step + 1 < keep:
            past = basis[:, :step]
            row = cosine[rows, chosen] - (past[rows, :, chosen].unsqueeze(1) @ past).squeeze(1)
            scale = residual[rows, chosen].clamp(min=RANK_TOLERANCE).rsqrt()
            row = row * scale.unsqueeze(1)
            basis[:, step] = row
            residual = residual - row * row
        residual[rows, chosen] = 0
        spent[rows, chosen] = -torch.inf
    return order
