"""Greedy MAP inference of a determinantal point process for small images, many at the same time, on a CPU.

With few tokens, calls cost more than arithmetic: about twenty per step, on a few hundred numbers each. Here each call
works for all images of a batch, and what is chosen for several questions from one image shares its cosines. The rules
are those of `dpp`, and so is the answer. Every operation is elementwise, or adds the numbers of one image one after the
other (numpy's einsum does, a BLAS does not), so no bit of an image depends on its neighbours.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .dpp import FEATURES, ROUNDING, unit


def greedy_map_batch(features: list[Tensor], quality: list[Tensor], keep: int) -> Tensor:
    """Choose tokens of images with the same number of tokens.

    Args:
        features: for each image [N, D] feature vectors of any length, on the CPU. An image may be there several times.
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
        self.quality, self.keep, self.count = quality, keep, count
        self.weight = np.square(quality)
        self.slack = 3 * ROUNDING * self.weight.max(axis=1)  # more than the errors of any two gains, for a growth of 1
        distinct, owner = _distinct(features)
        cosine = torch.empty(len(distinct), count, count, dtype=torch.float64)
        for one, out in zip(distinct, cosine, strict=True):  # a product of several images might choose another kernel
            vectors = unit(one)
            torch.mm(vectors, vectors.T, out=out)
        self.cosine = cosine.view(-1, count).numpy()
        self.place = np.array(owner) * count  # first row of an image in `cosine`
        # Exactly one, or zero for a vector of zeros, so that rounding does not decide between equal tokens.
        self.residual = (cosine.diagonal(dim1=-2, dim2=-1).numpy() > 0.5).astype(float)[owner]
        self.basis = np.empty((keep, batch, count))
        self.order = np.empty((keep, batch), dtype=np.int64)
        self.growth, self.least = np.ones(batch), np.ones(batch)
        self.active = np.arange(batch)  # images of which a token has a residual left
        self._resize()

    def _resize(self) -> None:
        """Make what has the size of the active images: where each begins among the tokens of all, and scratch."""
        self.start = np.arange(len(self.active)) * self.count
        self.gain, self.product = np.empty_like(self.weight), np.empty_like(self.weight)

    def run(self) -> np.ndarray:
        """Choose the tokens. Returns [B, keep] distinct indices, in the order of choice."""
        for step in range(self.keep):
            chosen = self._best(step)
            if not len(self.active):
                break
            self._choose(step, chosen)
        return np.ascontiguousarray(self.order.T)

    def _best(self, step: int) -> np.ndarray:
        """For each active image, the token with the largest gain. Of equal ones it is the first.

        An image without residual gets all tokens that it lacks, and is active no longer.
        """
        gain = np.multiply(self.weight, self.residual, out=self.gain)
        chosen = gain.argmax(axis=1)
        token = self.start + chosen  # among those of all images
        near = gain >= (gain.take(token) - self.slack * self.growth)[:, None]
        spans = self.residual.take(token) > FEATURES * self.growth
        if np.count_nonzero(near) == len(chosen) and spans.all():  # nothing is near the best token of any image
            return chosen
        unclear = ((np.count_nonzero(near, axis=1) > 1) | ~spans).nonzero()[0]
        ended = [row for row in unclear if not self._settle(row, gain[row], step, chosen)]
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
        order = self.order[:, self.active[row]]
        left = np.argsort(-self.quality[self.active[row]], kind="stable")
        order[step:] = left[~np.isin(left, order[:step])][: self.keep - step]
        return False

    def _leave(self, rows: list[int]) -> None:
        """Drop images that are done."""
        for name in ("weight", "slack", "place", "residual", "growth", "least", "active"):
            setattr(self, name, np.delete(getattr(self, name), rows, axis=0))
        self.basis = np.delete(self.basis, rows, axis=1)
        self._resize()

    def _choose(self, step: int, chosen: np.ndarray) -> None:
        """Add a token to those of each active image, and take its direction out of all residuals."""
        token = self.start + chosen
        left = self.residual.take(token)
        self.order[step].put(self.active, chosen)
        past, added = self.basis[:step], self.basis[step]
        np.einsum("sb,sbn->bn", past.reshape(step, token.size * self.count).take(token, axis=1), past, out=added)
        np.subtract(self.cosine.take(self.place + chosen, axis=0), added, out=added)
        added *= left[:, None] ** -0.5
        self.residual -= np.multiply(added, added, out=self.product)
        self.residual.put(token, -1)  # chosen
        self.least = np.minimum(self.least, left)
        self.growth = 1 + (step + 1) / self.least


def _distinct(features: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The tensors without those that are views of the same numbers, and for each given one its place among them."""
    distinct: list[Tensor] = []
    places: dict[object, int] = {}
    owner = []
    for one in features:
        key = one.data_ptr(), one.shape, one.stride(), one.dtype
        if key not in places:
            places[key] = len(distinct)
            distinct.append(one)
        owner.append(places[key])
    return distinct, owner
