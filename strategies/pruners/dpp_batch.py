"""Greedy MAP inference of a determinantal point process for small images, many at the same time, on a CPU.

With few tokens, calls cost more than arithmetic: about twenty per step, on a few hundred numbers each. Here each call
works for all images of a batch. The rules are those of `dpp`, and so is the answer. Every operation is elementwise, or
adds the numbers of one image one after the other (numpy's einsum does, a BLAS does not), so no bit of an image depends
on its neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .dpp import FEATURES, ROUNDING


def greedy_map_batch(features: list[Tensor], quality: list[Tensor], keep: int) -> Tensor:
    """Choose tokens of images with the same number of tokens.

    Args:
        features: for each image [N, D] feature vectors of any length, on the CPU.
        quality: for each image [N], not negative.
        keep: number of tokens to choose per image.

    Returns:
        [B, keep] distinct indices, in the order of choice.
    """
    return torch.from_numpy(BatchGreedy(features, torch.stack(quality).double().numpy(), keep).run())


class BatchGreedy:
    """Greedy MAP inference for several images.

    Args:
        features: for each image [N, D] feature vectors of any length, on the CPU.
        quality: [B, N] in float64, not negative.
        keep: number of tokens to choose.
    """

    def __init__(self, features: list[Tensor], quality: np.ndarray, keep: int) -> None:
        batch, count = quality.shape
        self.quality, self.keep = quality, keep
        self.weight = np.square(quality)
        self.slack = 3 * ROUNDING * self.weight.max(axis=1)  # more than the errors of any two gains, for a growth of 1
        self.cosine = np.empty((batch, count, count))
        self.residual = np.empty((batch, count))
        for index, one in enumerate(features):  # a product of several images might choose another kernel
            vectors = one.double()
            norm = torch.linalg.vector_norm(vectors, dim=1)
            vectors /= torch.where(norm > 0, norm, 1).unsqueeze(1)
            torch.mm(vectors, vectors.T, out=torch.from_numpy(self.cosine[index]))
            self.residual[index] = norm > 0  # exactly one, so that rounding does not decide between equal tokens
        self.basis = np.empty((batch, keep, count))
        self.order = np.empty((batch, keep), dtype=np.int64)
        self.growth, self.least = np.ones(batch), np.ones(batch)
        self.active = np.arange(batch)  # images of which a token has a residual left

    def run(self) -> np.ndarray:
        """Choose the tokens. Returns [B, keep] distinct indices, in the order of choice."""
        for step in range(self.keep):
            chosen = self._best(step)
            if not len(self.active):
                break
            self._choose(step, chosen)
        return self.order

    def _best(self, step: int) -> np.ndarray:
        """For each active image, the token with the largest gain. Of equal ones it is the first.

        An image without residual gets all tokens that it lacks, and is active no longer.
        """
        gain = self.weight * self.residual
        rows = np.arange(len(gain))
        chosen = gain.argmax(axis=1)
        least = gain[rows, chosen] - self.slack * self.growth
        clear = (gain >= least[:, None]).sum(axis=1) == 1
        clear &= self.residual[rows, chosen] > FEATURES * self.growth
        if not clear.all():
            ended = [row for row in (~clear).nonzero()[0] if not self._settle(row, gain[row], step, chosen)]
            if ended:
                chosen = np.delete(chosen, ended)
                self._leave(ended)
        return chosen

    def _settle(self, row: int, gain: np.ndarray, step: int, chosen: np.ndarray) -> bool:
        """Find the best token of an image whose largest gain is not clear. Returns whether there is one."""
        spans = self.residual[row] > FEATURES * self.growth[row]
        weighed = self.weight[row] * (ROUNDING * self.growth[row])
        if spans.any():
            chosen[row] = (spans & (gain + weighed >= (gain - weighed)[spans].max())).argmax()
            return True
        order = self.order[self.active[row]]
        left = np.argsort(-self.quality[self.active[row]], kind="stable")
        order[step:] = left[~np.isin(left, order[:step])][: self.keep - step]
        return False

    def _leave(self, rows: list[int]) -> None:
        """Drop images that are done."""
        for name in ("weight", "slack", "cosine", "residual", "basis", "growth", "least", "active"):
            setattr(self, name, np.delete(getattr(self, name), rows, axis=0))

    def _choose(self, step: int, chosen: np.ndarray) -> None:
        """Add a token to those of each active image, and take its direction out of all residuals."""
        rows = np.arange(len(chosen))
        left = self.residual[rows, chosen]
        self.order[self.active, step] = chosen
        past, added = self.basis[:, :step], self.basis[:, step]
        np.subtract(self.cosine[rows, chosen], np.einsum("bi,bij->bj", past[rows, :, chosen], past), out=added)
        added *= left[:, None] ** -0.5
        self.residual -= added * added
        self.residual[rows, chosen] = -1  # chosen
        self.least = np.minimum(self.least, left)
        self.growth = 1 + (step + 1) / self.least
