"""VisionZip: dominant and contextual tokens (arXiv 2412.04467)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qapbench import Fraction, Pruner, Selection, VisionTokens, pruner, top_k


@pruner("visionzip")
@dataclass(frozen=True)
class VisionZip(Pruner):
    """Keeps the CLS token and the patches it attends to most, and merges the rest by key similarity.

    The budget is CLS + dominant patches + contextual tokens. `contextual` is their share of it: 10 of 64, 20 of 128
    and 30 of 192 in the released code, which is 5/32. Sensitivity enters where dominant patches are chosen. Where
    the model records no CLS token, its place goes to one more patch.
    """

    needs = frozenset({"cls_attention", "keys", "patches", "cls_token"})
    optional = frozenset({"cls_token"})
    contextual: Fraction = 5 / 32

    def relevance(self, tokens: VisionTokens) -> Tensor:
        return tokens.require("cls_attention", "visionzip")

    def choose(self, tokens: VisionTokens, scores: Tensor, keep: int) -> Selection:
        patches = tokens.require("patches", "visionzip").float()
        with_cls = int(tokens.cls_token is not None and keep > 1)
        targets = min(round(keep * self.contextual), keep - with_cls - 1)
        dominant = top_k(scores, keep - with_cls - targets)
        merged = [] if not with_cls else [tokens.require("cls_token", "visionzip").float().unsqueeze(1)]
        if targets:
            merged.append(self._contextual(tokens, patches, dominant, targets))
        return Selection(dominant, torch.cat(merged, dim=1) if merged else None, "patches", front=with_cls)

    def _contextual(self, tokens: VisionTokens, patches: Tensor, dominant: Tensor, targets: int) -> Tensor:
        """[B, targets, C]: every step-th remaining patch plus the mean of those whose keys are nearest to it."""
        rest = ~Selection(dominant).mask(tokens.count)
        left = rest.nonzero()[:, 1].view(tokens.batch, -1)
        step = max(1, left.shape[1] // targets)
        is_target = torch.zeros_like(left, dtype=torch.bool)
        is_target[:, : step * targets : step] = True
        target, other = left[is_target].view(tokens.batch, -1), left[~is_target].view(tokens.batch, -1)

        keys = tokens.require("keys", "visionzip").float().unflatten(-1, (tokens.heads, -1)).mean(dim=-2)
        metric = normalize(keys, dim=-1)
        nearest = (_take(metric, other) @ _take(metric, target).mT).argmax(dim=-1)
        assign = torch.nn.functional.one_hot(nearest, targets).to(patches.dtype)
        mean = (assign.mT @ _take(patches, other)) / assign.sum(dim=1).clamp(min=1).unsqueeze(-1)
        return _take(patches, target) + mean


def _take(values: Tensor, indices: Tensor) -> Tensor:
    """values [B, N, C] at indices [B, K] -> [B, K, C]."""
    return values.gather(1, indices.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
