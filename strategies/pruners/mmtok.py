"""The pruner MMTok: tokens that cover both the words of the question and the image."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from qapbench import Pruner, Selection, VisionTokens, pruner

from .coverage import greedy_coverage

Temperature = Annotated[float, Field(gt=0)]


@pruner("mmtok")
@dataclass(frozen=True)
class MMTok(Pruner):
    """Keep the tokens that cover the question's words and the image best, by greedy maximum coverage.

    Each next token is the one that adds most to the coverage of the rows [P; alpha * Q]. Row i of P is
    softmax_j(cos(w_i, v_j) / text_temperature) / L for each of the question's L tokens, where w are the language
    model's input embeddings and v are the projected tokens. Row i of Q is softmax_j(cos(x_i, x_j) /
    vision_temperature) / N for each of the N patches x before the projector. The method has no relevance of single
    tokens; if there is a sensitivity, each token's gain is multiplied by its score, which the published method does
    not do.

    Two things differ from the released code. The question is the caller's `relevance_text` or else the whole text of
    the prompt, where the release splits the question at white space, drops a list of stop words and two fixed phrases
    of its prompts. There are no padded patches to leave out. What the release decides and the paper leaves open: the
    temperatures, and that words have no context.

    Attributes:
        alpha: weight of the coverage of the image beside that of the words. The release has 0.5.
        text_temperature: temperature of the softmax of words over tokens. The release has 0.02 for LLaVA and 0.01 for
            Qwen2.5-VL.
        vision_temperature: temperature of the softmax of patches over patches. The release has 0.2.

    Source:
        MMTok (arXiv 2508.18264); released code Ironieser/MMTok at d1522cd.
    """

    needs = frozenset({"patches", "prompt_embeds"})
    alpha: Annotated[float, Field(ge=0)] = 0.5
    text_temperature: Temperature = 0.02
    vision_temperature: Temperature = 0.2

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return torch.ones(tokens.projected.shape[:2], device=tokens.projected.device, dtype=torch.float32)

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        words, visual, patches = (
            normalize(x.float(), dim=-1, eps=1e-8)
            for x in (tokens.require("prompt_embeds", "mmtok"), tokens.projected, tokens.require("patches", "mmtok"))
        )
        of_words = (words @ visual.mT / self.text_temperature).softmax(dim=-1) / words.shape[1]
        of_image = (patches @ patches.mT / self.vision_temperature).softmax(dim=-1) / patches.shape[1]
        rows = torch.cat([of_words, self.alpha * of_image], dim=1)
        return Selection(greedy_coverage(rows, keep, lambda gains: gains * scores))
