"""The pruner SparseVLM: words of the prompt rate the tokens, and dropped tokens are merged into a few new ones."""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from qapbench import DecoderPruner, Selection, Stage, VisionTokens, even_stages, pruner, top_k

LAYERS = (3 / 32, 7 / 32, 16 / 32)  # share of the layers before each drop: after layers 2, 6 and 15 (from 0) of 32
RECYCLED = 0.3  # share of the dropped tokens, those with the highest scores, that are merged instead of lost
PER_CLUSTER = 10  # recycled tokens per merged one


@pruner("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(DecoderPruner):
    """Keep the tokens that the relevant words of the prompt attend to most, and merge some of the dropped ones.

    The relevant words, called raters, are found among the words after the image. For each image token as it entered the
    decoder, the dot products with all words go through a softmax; raters are the words whose mean over the image tokens
    is above the average word's. Tokens are ranked by the raters' attention, the mean over heads and raters. Of R
    dropped tokens, the n = floor(0.3 R) + 1 best are recycled: DPC-kNN clusters them into floor(n / 10) + 1 groups, and
    the mean of each group replaces the token at its centre.

    There are three drops, each of which keeps the same fraction. The layers after the last one see `keep` tokens per
    image, kept and merged ones together. Sensitivity is computed on the hidden states at each drop and fused with the
    raters' attention, so it decides both what is kept and what is recycled.

    Three things differ from the released code. Budgets are exact for any `keep`; the release has lists for 64, 128 and
    192 tokens, to which it adds the merged ones. Merged tokens are at the position of their centre instead of after all
    others, and positions are not numbered anew. Ties in density go to the lower index instead of being broken by noise.

    Source:
        SparseVLM (arXiv 2410.04417).
    """

    needs = frozenset({"text_attention", "prompt_embeds", "embedded"})

    def stages(self, count: int, keep: int, depth: int) -> list[Stage]:
        return even_stages([depth * share for share in LAYERS], count, keep, depth)

    def relevance(self, tokens: VisionTokens) -> Tensor:
        embedded = tokens.require("embedded", "sparsevlm")
        raters = rating(embedded, tokens.require("prompt_embeds", "sparsevlm")).unsqueeze(1)
        attention = tokens.require("text_attention", "sparsevlm").float()
        return (attention * raters).sum(dim=-1) / raters.sum(dim=-1)

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        count, hidden = tokens.count, tokens.projected.float()
        kept = split(count, keep)
        best = Selection(top_k(scores, kept))
        if kept == keep:
            return best
        candidates = top_k(scores.masked_fill(best.mask(count), -torch.inf), recycled(count - kept))
        merged, centres = cluster(take(hidden, candidates), keep - kept)
        indices = torch.cat([best.indices, candidates.gather(1, centres)], dim=1)
        updated = torch.cat([take(hidden, best.indices), merged], dim=1)
        order = indices.argsort(dim=1)
        return Selection(indices.gather(1, order), updated=take(updated, order), made=order >= kept)


def rating(visual: Tensor, words: Tensor) -> Tensor:
    """Find the words that rate an image's tokens. If no word stands out, all of them do.

    Args:
        visual: [B, E, D] tokens of the image as they entered the decoder.
        words: [B, L, D] embeddings of the words after the image.

    Returns:
        [B, L] bool, True for the raters.
    """
    share = (visual.float() @ words.float().mT).softmax(dim=-1).mean(dim=1)
    raters = share > share.mean(dim=-1, keepdim=True)
    return raters | ~raters.any(dim=-1, keepdim=True)


def recycled(dropped: int) -> int:
    """Number of tokens to merge out of so many dropped ones."""
    return int(dropped * RECYCLED) + 1


def split(count: int, keep: int) -> int:
    """Number of tokens to keep as they are, so that they and the merged ones are `keep` together.

    It is the largest number that leaves room for the clusters of the tokens dropped, and at least one.

    Args:
        count: tokens per image before the drop.
        keep: tokens per image after it.
    """
    fits = (k for k in range(keep - 1, 0, -1) if k + recycled(count - k) // PER_CLUSTER + 1 <= keep)
    return next(fits, 1)


def cluster(tokens: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Cluster tokens by DPC-kNN.

    Centres are tokens that are dense and far from denser ones. Every token joins the nearest centre. The density of a
    token is exp(-m), where m is the mean squared distance to its nearest tokens. There are as many of them as clusters,
    and the token itself is one of them. Distances are divided by sqrt(D). With a single cluster all densities would be
    equal, so m is then taken over all tokens and the centre is the medoid.

    Args:
        tokens: [B, R, D].
        clusters: number of clusters, at most R.

    Returns:
        The means of the clusters [B, clusters, D], and the indices of their centres [B, clusters], ascending.
    """
    wide = tokens.double()  # in float32, the matmul would lose small distances between long vectors
    distance = torch.cdist(wide, wide, compute_mode="use_mm_for_euclid_dist") / sqrt(tokens.shape[-1])
    distance.diagonal(dim1=1, dim2=2).zero_()
    near = distance.topk(clusters if clusters > 1 else tokens.shape[1], dim=-1, largest=False).values
    density = (-near.square().mean(dim=-1)).exp()
    one, other = density.unsqueeze(2), density.unsqueeze(1)
    earlier = torch.ones_like(distance, dtype=torch.bool).tril(-1)
    denser = (other > one) | ((other == one) & earlier)
    farthest = distance.amax(dim=(1, 2), keepdim=True)
    centres = top_k(density * torch.where(denser, distance, farthest).amin(dim=-1), clusters)
    nearest = distance.gather(2, centres.unsqueeze(1).expand(-1, tokens.shape[1], -1)).argmin(dim=-1)
    itself = torch.arange(clusters, device=tokens.device).expand_as(centres)
    members = one_hot(nearest.scatter(1, centres, itself), clusters).to(tokens.dtype)
    return members.mT @ tokens / members.sum(dim=1).unsqueeze(-1), centres


def take(values: Tensor, indices: Tensor) -> Tensor:
    """Take the rows of values [B, N, D] at indices [B, K]: [B, K, D]."""
    return values.gather(1, indices.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
