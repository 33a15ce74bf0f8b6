"""The pruner TRIM: tokens are chosen by their similarity to the question, and the others become one token."""

from dataclasses import dataclass

from torch import Tensor

from qapbench import Pruner, RelevanceSign, Selection, VisionTokens, pruner, top_k


@pruner("trim")
@dataclass(frozen=True)
class Trim(Pruner):
    """Keep the patches that are most relevant to the question, and append the mean of the removed ones.

    Relevance is the dot product of patch and question in CLIP's joint space, with the sign that `relevance_sign` gives
    it and without normalisation. For a question of several segments it is the mean over them. The budget is keep - 1
    patches and the mean of the others. With keep=1 it is the best patch alone. Sensitivity enters the choice of
    patches.

    Three things differ from the released code. There is no softmax over the similarities: it does not change their
    order, but would flatten them before sensitivity is fused in. Questions are not cut off at 77 tokens. The number of
    patches is given by the budget instead of being the number of outliers in similarity (interquartile rule) over the
    batch.

    Attributes:
        relevance_sign: sign of the similarity between patch and question that counts as relevance. "auto" is the sign
            of the text tower, which the receipt says. "negative" is what the released code does: in OpenAI's CLIP,
            patches that matter to a text are found to have a low similarity with it. "positive" is right for a tower
            whose patches were aligned with text.

    Source:
        TRIM (arXiv 2409.10994).
    """

    needs = frozenset({"image_embeds", "text_embeds", "patches"})
    relevance_sign: RelevanceSign = "auto"

    def relevance(self, tokens: VisionTokens) -> Tensor:
        image = tokens.require("image_embeds", "trim").float()
        text = tokens.require("text_embeds", "trim").float()
        return tokens.relevance_of((image @ text.mT).mean(dim=-1), self.relevance_sign)

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        if keep == 1:
            return Selection(top_k(scores, 1))
        kept = Selection(top_k(scores, keep - 1))
        removed = ~kept.mask(tokens.count).unsqueeze(-1)
        patches = tokens.require("patches", "trim").float()
        mean = (patches * removed).sum(dim=1, keepdim=True) / removed.sum(dim=1, keepdim=True)
        return Selection(kept.indices, mean, "patches")
