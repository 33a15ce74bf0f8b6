"""The pruner CDPruner: relevant and diverse tokens by a determinantal point process (DPP)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from qapbench import Pruner, RelevanceSign, Selection, VisionTokens, pruner

from .dpp import greedy_map, greedy_map_lazy, unit


@pruner("cdpruner")
@dataclass(frozen=True)
class CDPruner(Pruner):
    """Keep tokens that are relevant to the question and unlike each other, by greedy MAP inference of a DPP.

    The kernel of the determinantal point process is K_ij = r_i cos(f_i, f_j) r_j. f are the tokens' features after the
    projector. r is the score: how relevant a token is to the question, fused with its sensitivity if there is one.

    Two things differ from the released code. Scores are normalised per image and not over the batch. Once as many
    tokens are chosen as the kernel has rank, the released code divides by zero; here the remaining tokens are taken in
    the order of their scores.

    Attributes:
        relevance_sign: sign of the similarity between token and question that counts as relevance. "auto" is the sign
            of the text tower, which the receipt says. "negative" is what the released code does: in OpenAI's CLIP,
            patches that matter to a text are found to have a low cosine similarity with it. "positive" is right for a
            tower whose patches were aligned with text.

    Source:
        CDPruner (arXiv 2506.10967).
    """

    needs = frozenset({"image_embeds", "text_embeds"})
    relevance_sign: RelevanceSign = "auto"

    def relevance(self, tokens: VisionTokens) -> Tensor:
        image = normalize(tokens.require("image_embeds", "cdpruner").float(), dim=-1)
        text = normalize(tokens.require("text_embeds", "cdpruner").float(), dim=-1)
        return tokens.relevance_of((image @ text.mT).mean(dim=-1), self.relevance_sign)

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        features = tokens.projected
        if features.is_cuda:
            directions = unit(features)
            return Selection(greedy_map(directions @ directions.mT, scores, keep))
        # Other devices may have no float64, which the selection is computed in.
        indices = greedy_map_lazy(features.cpu(), scores.cpu(), keep)
        return Selection(indices.to(features.device))
