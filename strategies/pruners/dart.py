"""The pruner DART: tokens are kept that duplicate a few pivots least."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from qapbench import DecoderPruner, Selection, Stage, VisionTokens, pruner, top_k


@pruner("dart")
@dataclass(frozen=True)
class Dart(DecoderPruner):
    """Keep the tokens that are least like a few pivots, behind an early layer of the decoder.

    Pivots are the image tokens and the tokens of the text behind the image whose keys have the largest L1 norm in the
    last layer before the drop, after the rotary embedding and over all heads. Each pivot in turn keeps those of the
    image tokens not yet kept whose hidden states have the lowest cosine with its own. Image pivots are kept too, text
    pivots only steer. Hidden states are compared after the decoder's last norm. Sensitivity is fused with the norm of
    the keys, so it decides which image tokens are pivots.

    Three things differ from the released code. `keep` is exact: what is left beside the image pivots is dealt to the
    pivots as evenly as possible, earlier ones first, where the release keeps 4 + 8 * floor(keep / 8) (132 for 128).
    Pivots take their turn by falling norm, image pivots first; in the release it is the order in which Python iterates
    a set of their positions, on which the kept tokens depend. Every prompt of a batch chooses for itself, where in the
    release the first one chooses for all. What the release decides and the paper leaves open: keys and not queries or
    values, after the rotary embedding, cosines after the decoder's last norm.

    Attributes:
        layer: number of decoder layers that see the whole image. The release has 2. In a decoder with no more layers
            than this, the drop comes before the last layer.
        image_pivots: number of pivots among the image's tokens, at least one. The release has 4.
        text_pivots: number of pivots among the text behind the image. The release has 4.

    Source:
        DART (arXiv 2502.11494); released code ZichenWen1/DART at 5a19452.
    """

    needs = frozenset({"rotated_keys", "text_keys", "final_states", "text_states"})
    layer: Annotated[int, Field(ge=1)] = 2
    image_pivots: Annotated[int, Field(ge=1)] = 4
    text_pivots: Annotated[int, Field(ge=0)] = 4

    def stages(self, count: int, keep: int, depth: int) -> list[Stage]:
        return [Stage(min(self.layer, depth - 1), keep)]

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return length(tokens.require("rotated_keys", "dart"))

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        words = length(tokens.require("text_keys", "dart"))
        states = tokens.require("final_states", "dart"), tokens.require("text_states", "dart")
        return unlike(scores, words, *states, keep, self.image_pivots, self.text_pivots)


def length(vectors: Tensor) -> Tensor:
    """The L1 norm of vectors [B, N, D]: [B, N] in float32."""
    return vectors.float().abs().sum(dim=-1)


def unlike(
    scores: Tensor, words: Tensor, image: Tensor, text: Tensor, keep: int, image_pivots: int, text_pivots: int
) -> Selection:
    """Choose by the pivots with the highest scores, those of the image first, each group from the highest score down.

    Args:
        scores: [B, N] of the image's tokens.
        words: [B, L] of the text's tokens.
        image: [B, N, D] what is compared of the image's tokens.
        text: [B, L, D] the same of the text's tokens.
        keep: tokens to keep per image.
        image_pivots: number of pivots among the image's tokens.
        text_pivots: number of pivots among the text's tokens.
    """
    first, second = (ranked(x, most) for x, most in ((scores, min(image_pivots, keep)), (words, text_pivots)))
    image, text = (normalize(x.float(), dim=-1) for x in (image, text))
    pivots = torch.cat([take(image, first), take(text, second)], dim=1)
    return Selection(least_alike(pivots @ image.mT, first, keep))


def ranked(scores: Tensor, most: int) -> Tensor:
    """Indices of the `most` highest scores [B, N], the highest first. Ties go to the lower index."""
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :most]


def least_alike(cosine: Tensor, kept: Tensor, keep: int) -> Tensor:
    """Let each pivot in turn keep the tokens that are least like it.

    Args:
        cosine: [B, P, N] of each pivot with each token, pivots in the order of their turns.
        kept: [B, p] distinct tokens that are kept already, p <= keep.
        keep: number of tokens to keep. Each pivot keeps floor((keep - p) / P) more, and the first ones another one, so
            that all are `keep`. Ties go to the lower index.

    Returns:
        [B, keep] distinct indices.
    """
    share, more = divmod(keep - kept.shape[1], cosine.shape[1])
    for turn in range(cosine.shape[1]):
        unlike = -cosine[:, turn].masked_fill(Selection(kept).mask(cosine.shape[2]), torch.inf)
        kept = torch.cat([kept, top_k(unlike, share + (turn < more))], dim=1)
    return kept


def take(values: Tensor, indices: Tensor) -> Tensor:
    """Take the rows of values [B, N, D] at indices [B, K]: [B, K, D]."""
    return values.gather(1, indices.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
