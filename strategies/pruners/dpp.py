"""Greedy MAP inference of a determinantal point process (Chen et al. 2018, arXiv 1709.05135).

The kernel is K_ij = q_i S_ij q_j, where S is the cosine similarity of the features and q the quality of the tokens. The
gain of a token is q_i^2 times the squared length of the part of its unit vector that lies outside the span of the
chosen tokens (its residual). Quality does not enter the recursion in this form, so a quality of zero does no harm.
Equal gains go to the lower index. Tokens without a residual are taken once no other is left, in the order of their
quality.

There are two implementations that give the same answer. `greedy_map` takes the whole cosine matrix of a batch and is
meant for a GPU. `greedy_map_lazy` computes only the parts of that matrix that it needs and is meant for a CPU. They add
in different orders, so in float32 they would choose differently wherever the last bits decide, and past the rank of the
features they always do. Both compute in float64 and round to what the input can tell. With k tokens chosen, the
smallest of whose residuals was m, an error of the input grows by up to a factor of about 1 + k / m:

- Features are float32 numbers. A residual of less than eps32^2 (1 + k / m) may be nothing but their rounding and counts
  as zero. (The square is there because a residual is a squared length.)
- Residuals within 8 eps64 (1 + k / m) of each other may differ by the rounding of the computation alone: gains that are
  closer than that are equal.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FEATURES = torch.finfo(torch.float32).eps ** 2  # squared relative precision of the features
ROUNDING = 8 * torch.finfo(torch.float64).eps  # of a cosine, and of a step of the recursion
BLOCK = 192  # tokens by which the lazy implementation widens its view: enough for an efficient matmul
ROWS = 32  # rows of the cosine matrix that it computes at a time, at least
SMALL = 2**23  # multiply-adds of a product that costs no more than predicting which of its rows will be needed


def unit(features: Tensor) -> Tensor:
    """Scale vectors [..., D] of any length to length one, in float64. Vectors of zeros stay as they are."""
    vectors = features.double()
    norm = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(norm > 0, norm, 1)


def greedy_map(cosine: Tensor, quality: Tensor, keep: int) -> Tensor:
    """Choose tokens of all images at the same time.

    Args:
        cosine: [B, N, N] cosine similarities: `u @ u.mT` for u = `unit(features)`.
        quality: [B, N], not negative.
        keep: number of tokens to choose per image.

    Returns:
        [B, keep] distinct indices, in the order of choice.
    """
    precision = max(FEATURES, torch.finfo(cosine.dtype).eps)  # of float32 cosines no more can be told
    cosine, quality = cosine.double(), quality.double()
    batch, count = quality.shape
    rows = torch.arange(batch, device=quality.device)
    weight = quality * quality
    # Exactly one, or zero for a vector of zeros, so that rounding does not decide between equal tokens.
    residual = (cosine.diagonal(dim1=-2, dim2=-1) > 0.5).double()
    basis = cosine.new_zeros(batch, keep, count)
    order = torch.empty(batch, keep, dtype=torch.long, device=quality.device)
    rank, least = cosine.new_zeros(batch, 1), cosine.new_ones(batch, 1)
    for step in range(keep):
        growth = 1 + rank / least
        spans, error = residual > precision * growth, ROUNDING * growth
        bound = torch.where(spans, weight * (residual - error), -torch.inf).amax(dim=-1, keepdim=True)
        gains = spans & (weight * (residual + error) >= bound)
        best = torch.where(spans.any(dim=-1, keepdim=True), gains, quality == quality.amax(dim=-1, keepdim=True))
        chosen = best.int().argmax(dim=-1)  # the first of equal ones
        order[:, step] = chosen
        left, adds = residual[rows, chosen].unsqueeze(1), spans[rows, chosen].unsqueeze(1)
        if step + 1 < keep:
            past = basis[:, :step]
            row = cosine[rows, chosen] - (past[rows, :, chosen].unsqueeze(1) @ past).squeeze(1)
            # A token without residual adds no direction to the span.
            basis[:, step] = row = torch.where(adds, row * left.rsqrt(), 0)
            residual = residual - row * row
        rank, least = rank + adds, torch.where(adds, torch.minimum(least, left), least)
        residual[rows, chosen] = quality[rows, chosen] = -1
    return order


def greedy_map_lazy(features: Tensor, quality: Tensor, keep: int) -> Tensor:
    """Choose tokens one image after the other, computing only parts of the cosine matrix.

    On a CPU that matrix is most of the cost. Not all of its columns are needed: no gain exceeds q^2, so tokens are
    considered in the order of their quality, block by block, and only while the next token's q^2 could exceed the best
    gain. Not all of its rows are needed either: only those of chosen tokens are. They are computed together with the
    rows of the tokens that come next by gain. Each image is processed by itself, so the batch cannot change its result.

    Args:
        features: [B, N, D] feature vectors of any length, on the CPU.
        quality: [B, N], not negative.
        keep: number of tokens to choose per image.

    Returns:
        [B, keep] distinct indices, in the order of choice.
    """
    return torch.stack([LazyGreedy(*image, keep).run() for image in zip(features, quality, strict=True)])


class LazyGreedy:
    """Greedy MAP inference for one image.

    All arrays are in the order of quality, so the tokens considered so far are a prefix of them. The loop is written in
    numpy because it makes about ten calls per step on a few hundred numbers each, and a call costs less in numpy than
    in torch. It calls no BLAS of numpy's, whose threads would compete with torch's: large products are torch's.

    Args:
        features: [N, D] feature vectors of any length, on the CPU.
        quality: [N], not negative.
        keep: number of tokens to choose.
    """

    def __init__(self, features: Tensor, quality: Tensor, keep: int) -> None:
        count, width = features.shape
        self.ranked = quality.argsort(descending=True, stable=True)
        self.places = self.ranked.numpy()
        self.features, self.keep, self.count, self.seen = features, keep, count, 0
        self.weight = np.square(quality[self.ranked].double().numpy())
        self.vectors = torch.empty(count, width, dtype=torch.float64)
        self.held_vectors = torch.empty_like(self.vectors)
        self.inverse, self.scale = np.empty(count), np.empty(count)  # one over the norms, of tokens and of held rows
        self.cosine = np.empty((count, count))  # rows are filled as they are computed
        self.held = 0
        self.slot = np.full(count, -1)  # which row of `cosine` is a token's; -1: not computed yet
        self.basis = np.empty((keep, count))
        self.residual, self.gain = np.empty(count), np.empty(count)
        self.views = self.gain[:0], self.residual[:0], self.weight[:0]  # of the tokens considered so far
        self.heaviest = float(self.weight[0]) if count else 0.0
        self.growth = 1.0
        self.chosen: list[int] = []
        self.least = 1.0

    def run(self) -> Tensor:
        """Choose the tokens. Returns [keep] distinct indices, in the order of choice."""
        self._widen()
        while len(self.chosen) < self.keep:
            token, bound = self._best()
            if self.seen < self.count and bound <= self.weight[self.seen] * (1 + ROUNDING * self.growth):
                self._widen()
            elif token is None:  # nothing is left outside the span: the others follow in the order of their quality
                rest = np.delete(np.arange(self.count), self.chosen)
                self.chosen += rest[: self.keep - len(self.chosen)].tolist()
            else:
                self._choose(token)
        return self.ranked[self.chosen]

    def _best(self) -> tuple[int | None, float]:
        """Find the token with the largest gain. Of equal ones it is the first in the image.

        Returns:
            The token, and the least that its gain can be. None and -infinity if no token has a residual.
        """
        gain, residual, weight = self.views
        error = ROUNDING * self.growth
        np.multiply(weight, residual, out=gain)
        first = gain.argmax()
        most, least = gain.item(first), residual.item(first)
        slack = 3 * error * self.heaviest  # more than the errors of any two gains
        if least > FEATURES * self.growth and np.count_nonzero(gain >= most - slack) == 1:
            return int(first), most - weight.item(first) * error
        spans = residual > FEATURES * self.growth
        gain[~spans] = -np.inf
        weighed = weight * error
        bound = (gain - weighed).max()
        equal = ((gain + weighed >= bound) & spans).nonzero()[0]
        if not len(equal):
            return None, -np.inf
        return int(equal[self.places[equal].argmin()]), float(bound)

    def _choose(self, token: int) -> None:
        """Add a token to those chosen and take its direction out of all residuals."""
        step, residual = len(self.chosen), self.views[1]
        left = residual.item(token)
        self.chosen.append(token)
        if self.slot[token] < 0:
            self._hold(token)
        basis, row = self.basis[:step, : self.seen], self.basis[step, : self.seen]
        np.einsum("i,ij->j", basis[:, token], basis, out=row)
        np.subtract(self.cosine[self.slot[token], : self.seen], row, out=row)
        row *= left**-0.5
        residual -= row * row
        residual[token] = -1  # chosen
        self.least = min(self.least, left)
        self.growth = 1 + len(self.chosen) / self.least

    def _hold(self, token: int) -> None:
        """Compute the cosines of a token, and of the tokens that come next by gain, with all tokens considered."""
        seen, start = self.seen, self.held
        gain = np.where(self.slot[:seen] < 0, self.gain[:seen], -np.inf)
        gain[token] = np.inf
        number = min(max(ROWS, SMALL // (seen * self.vectors.shape[1])), seen - start)
        new = np.argpartition(-gain, number - 1)[:number]
        self.slot[new] = np.arange(start, start + number)
        self.held += number
        torch.index_select(self.vectors, 0, torch.from_numpy(new), out=self.held_vectors[start : start + number])
        self.scale[start : start + number] = self.inverse[new]
        self._compare(slice(start, start + number), slice(seen))

    def _widen(self) -> None:
        """Consider the next block of tokens: compute its cosines with the rows held, and its residuals."""
        start, stop = self.seen, min(self.seen + BLOCK, self.count)
        self.seen = stop
        new = self.vectors[start:stop].copy_(self.features[self.ranked[start:stop]])
        norm = torch.linalg.vector_norm(new, dim=1).numpy()
        residual = (norm > 0).astype(float)  # exactly one, so that rounding does not decide between equal tokens
        self.inverse[start:stop] = 1 / np.where(norm > 0, norm, 1)
        if self.chosen:
            self._compare(slice(self.held), slice(start, stop))
            span = self.basis[: len(self.chosen)]
            lower = torch.from_numpy(np.ascontiguousarray(span[:, self.chosen].T))
            rows = torch.from_numpy(self.cosine[self.slot[self.chosen], start:stop])
            span[:, start:stop] = torch.linalg.solve_triangular(lower, rows, upper=False).numpy()
            residual -= np.square(span[:, start:stop]).sum(axis=0)
        self.residual[start:stop] = residual
        self.views = self.gain[:stop], self.residual[:stop], self.weight[:stop]

    def _compare(self, held: slice, tokens: slice) -> None:
        """Fill in the cosines of some held rows with some tokens."""
        product = (self.held_vectors[held] @ self.vectors[tokens].T).numpy()
        np.multiply(product, self.scale[held, None], out=product)
        np.multiply(product, self.inverse[tokens], out=self.cosine[held, tokens])
