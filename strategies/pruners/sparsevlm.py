"""SparseVLM: words that see the image rate its tokens, and what is dropped is recycled (arXiv 2410.04417)."""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from qapbench import DecoderPruner, Selection, Stage, VisionTokens, even_stages, pruner, top_k

LAYERS = (3 / 32, 7 / 32, 16 / 32)  # drops are behind layers 2, 6 and 15 (from 0) of 32
RECYCLED = 0.3  # of the tokens dropped, the best by score
PER_CLUSTER = 10  # recycled tokens that become one


@pruner("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(DecoderPruner):
    """Keeps the tokens that the raters attend to most, mean over heads and raters, and merges some of the dropped.

    Raters are the words behind the image whose share of softmax over words of <image token, word>, mean over image
    tokens as they entered the decoder, is above the average word's. Of R tokens dropped, the floor(0.3 R) + 1 best are
    clustered by DPC-kNN into floor(of them / 10) + 1, and each cluster's mean stands at its centre. `keep` is what the
    layers behind the last drop see, kept and merged; every drop keeps the same share. Sensitivity, of the hidden states
    at each drop, is fused with the raters' attention: it decides what is kept and what is recycled.

    Differs from the released code: budgets are exact for any `keep`, where that has lists for 64, 128 and 192 and adds
    the merged on top; merged tokens stand at their centre's position and not behind the others, and positions are not
    numbered anew; no noise decides between equal densities, the lower index does.
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
    """[B, L] bool, the words [B, L, D] that rate the tokens [B, E, D]; where no word stands out, all do."""
    share = (visual.float() @ words.float().mT).softmax(dim=-1).mean(dim=1)
    raters = share > share.mean(dim=-1, keepdim=True)
    return raters | ~raters.any(dim=-1, keepdim=True)


def recycled(dropped: int) -> int:
    return int(dropped * RECYCLED) + 1


def split(count: int, keep: int) -> int:
    """How many of `keep` are kept as they are: the most that leave their clusters room, and at least one."""
    fits = (k for k in range(keep - 1, 0, -1) if k + recycled(count - k) // PER_CLUSTER + 1 <= keep)
    return next(fits, 1)


def cluster(tokens: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """DPC-kNN: centres are dense and far from what is denser; every token joins the nearest.

    Density is exp(-mean squared distance to the `clusters` nearest, itself among them), distances over sqrt(D). For one
    cluster that would be the same for all, so there all tokens count and the centre is the medoid.

    Args:
        tokens: [B, R, D].

    Returns:
        means [B, clusters, D], and the index of each one's centre [B, clusters], ascending.
    """
    wide = tokens.double()  # in float32 a matmul would lose small distances between long vectors
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
    """values [B, N, D] at indices [B, K] -> [B, K, D]."""
    return values.gather(1, indices.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
