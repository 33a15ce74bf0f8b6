"""CDPruner: conditional diversity by a determinantal point process (arXiv 2506.10967)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import normalize

from qapbench import Pruner, Selection, VisionTokens, pruner

from .dpp import greedy_map, greedy_map_lazy


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
        if tokens.projected.device.type == "cpu":
            return Selection(greedy_map_lazy(tokens.projected, scores, keep))
        features = normalize(tokens.projected.float(), dim=-1)
        return Selection(greedy_map(features @ features.mT, scores, keep))
