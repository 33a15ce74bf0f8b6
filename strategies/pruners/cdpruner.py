"""The pruner CDPruner: relevant and diverse tokens by a determinantal point process (DPP)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qapbench import Pruner, RelevanceSign, Selection, VisionTokens, pruner

from .dpp import BLOCK, greedy_map, greedy_map_lazy, unit
from .dpp_batch import greedy_map_batch


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
        return self.relevance_each([tokens])[0]

    def relevance_each(self, several: Sequence[VisionTokens]) -> list[Tensor]:
        images = _directions([tokens.require("image_embeds", "cdpruner") for tokens in several])
        texts = _directions([tokens.require("text_embeds", "cdpruner") for tokens in several])
        similar = [torch.bmm(image, text.mT).mean(dim=-1) for image, text in zip(images, texts, strict=True)]
        return [one.relevance_of(each, self.relevance_sign) for one, each in zip(several, similar, strict=True)]

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        features = tokens.projected
        if features.is_cuda:
            directions = unit(features)
            return Selection(greedy_map(directions @ directions.mT, scores, keep))
        # Other devices may have no float64, which the selection is computed in.
        indices = greedy_map_lazy(features.cpu(), scores.cpu(), keep)
        return Selection(indices.to(features.device))

    def choose_each(self, scored: Sequence[tuple[VisionTokens, Tensor]], keep: int) -> list[Selection]:
        together: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, (tokens, _) in enumerate(scored):
            if not tokens.projected.is_cuda and tokens.batch == 1 and tokens.count <= BLOCK:
                together[tuple(tokens.projected.shape)].append(place)
        found: dict[int, Selection] = {}
        for places in together.values():
            if len(places) > 1:
                features = [scored[place][0].projected[0] for place in places]
                scores = [scored[place][1][0].cpu() for place in places]
                order = greedy_map_batch([one.cpu() for one in features], scores, keep).to(features[0].device)
                found |= zip(places, map(Selection, order.split(1)), strict=True)
        return [found[at] if at in found else self.choose(*one, keep) for at, one in enumerate(scored)]


def _directions(several: list[Tensor]) -> list[Tensor]:
    """Vectors [B, N, D] of several batches, scaled to length one in float32; on a CPU those of one size in one call."""
    if several[0].is_cuda or len({one.shape for one in several}) > 1:  # a GPU sums few vectors in another order
        return [normalize(one.float(), dim=-1) for one in several]
    return list(normalize(torch.cat(several).float(), dim=-1).split(len(several[0])))
