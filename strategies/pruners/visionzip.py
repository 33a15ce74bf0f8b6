"""The pruner VisionZip: dominant tokens are kept, the others are merged into contextual ones."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from qapbench import Fraction, Pruner, Selection, VisionTokens, pruner, top_k


@pruner("visionzip")
@dataclass(frozen=True)
class VisionZip(Pruner):
    """Keep the CLS token and the patches that it attends to most, and merge the other patches by similarity of keys.

    The budget is the CLS token, the dominant patches and the contextual (merged) tokens together. If the model records
    no CLS token, there is one dominant patch more. Sensitivity enters the choice of the dominant patches.

    Attributes:
        contextual: share of the budget for contextual tokens. The released code has 10 of 64, 20 of 128 and 30 of 192
            tokens, which is 5/32.

    Source:
        VisionZip (arXiv 2412.04467).
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
        """Merge the patches that are not dominant into `targets` contextual tokens [B, targets, C].

        Evenly spaced patches among them are the targets. To each is added the mean of the other patches whose keys are
        most similar to its own.
        """
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
    """Take the rows of values [B, N, C] at indices [B, K]: [B, K, C]."""
    return values.gather(1, indices.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
