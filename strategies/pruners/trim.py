"""TRIM: text relevance in CLIP's joint space, and one token for all the rest (arXiv 2409.10994)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from qapbench import Pruner, Selection, VisionTokens, pruner, top_k


@pruner("trim")
@dataclass(frozen=True)
class Trim(Pruner):
    """Keeps the patches that the question points at, and appends the mean of those removed.

    Relevance is the negated dot product of patch and question, neither normalised; a question of several segments
    takes their mean. The budget is keep - 1 patches and that mean; keep=1 is the best patch alone. Sensitivity
    enters where patches are chosen.

    Attributes:
        relevance_sign: "negative" as released, an empirical fact about OpenAI's CLIP; "positive" is for towers
            whose patches were aligned with text.

    Differs from the released code: no softmax, which changes no order but would flatten what is fused; the question
    is not cut at 77 tokens; the number of patches is given, not the share of outliers (interquartile rule) over
    the batch.
    """

    needs = frozenset({"image_embeds", "text_embeds", "patches"})
    relevance_sign: Literal["negative", "positive"] = "negative"

    def relevance(self, tokens: VisionTokens) -> Tensor:
        image = tokens.require("image_embeds", "trim").float()
        text = tokens.require("text_embeds", "trim").float()
        similarity = (image @ text.mT).mean(dim=-1)
        return similarity if self.relevance_sign == "positive" else -similarity

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        if keep == 1:
            return Selection(top_k(scores, 1))
        kept = Selection(top_k(scores, keep - 1))
        removed = ~kept.mask(tokens.count).unsqueeze(-1)
        patches = tokens.require("patches", "trim").float()
        mean = (patches * removed).sum(dim=1, keepdim=True) / removed.sum(dim=1, keepdim=True)
        return Selection(kept.indices, mean, "patches")
