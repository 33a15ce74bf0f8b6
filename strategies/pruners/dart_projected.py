"""The pruner DART in front of the decoder, on projected tokens."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from qapbench import Pruner, Selection, VisionTokens, pruner

from .dart import length, unlike


@pruner("dart_projected")
@dataclass(frozen=True)
class DartProjected(Pruner):
    """DART in front of the decoder: projected tokens take the place of keys and of hidden states.

    Pivots are the projected tokens and the words of the prompt's input embeddings with the largest L1 norm. Everything
    else is as in `dart`.

    Attributes:
        image_pivots: number of pivots among the image's tokens, at least one.
        text_pivots: number of pivots among the words.

    Source:
        A variant of DART (arXiv 2502.11494) of this benchmark, for engines that take pruned embeddings; the release
        drops tokens inside the decoder.
    """

    needs = frozenset({"prompt_embeds"})
    image_pivots: Annotated[int, Field(ge=1)] = 4
    text_pivots: Annotated[int, Field(ge=0)] = 4

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return length(tokens.projected)

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        words = tokens.require("prompt_embeds", "dart_projected")
        return unlike(scores, length(words), tokens.projected, words, keep, self.image_pivots, self.text_pivots)
