"""Greedy MAP inference of a determinantal point process (Chen et al. 2018, arXiv 1709.05135).

The kernel is K_ij = q_i S_ij q_j, where S is the cosine similarity of the features and q the quality of the tokens. The
gain of a token is q_i^2 times the squared length of the part of its unit vector that lies outside the span of the
chosen tokens (its residual). Quality does not enter the recursion in this form, so a quality of zero does no harm. Ties
go to the lower index. Tokens without a residual are taken in the order of their quality.

There are two implementations that give the same answer. `greedy_map` takes the whole cosine matrix of a batch and is
meant for a GPU. `greedy_map_lazy` computes only the parts of that matrix that it needs and is meant for a CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

RANK_TOLERANCE = 1e-6  # float32 cannot tell a smaller squared residual of a unit vector from zero
BLOCK = 64  # tokens by which the lazy implementation widens its view: enough for an efficient matmul
ROWS = 32  # rows of the cosine matrix that it computes at a time
SLACK = 1 + 1e-5  # in float32, the squared norm of a unit vector exceeds one by less than this


def greedy_map(cosine: Tensor, quality: Tensor, keep: int) -> Tensor:
    """Choose tokens of all images at the same time.

    Args:
        cosine: [B, N, N] cosine similarities.
        quality: [B, N], not negative.
        keep: number of tokens to choose per image.

    Returns:
        [B, keep] distinct indices, in the order of choice.
    """
    batch, count = quality.shape
    rows = torch.arange(batch, device=quality.device)
    weight = quality * quality
    # Exactly one, or zero for a vector of zeros, so that rounding does not decide between equal tokens.
    residual = (cosine.diagonal(dim1=-2, dim2=-1) > 0.5).to(quality.dtype)
    basis = cosine.new_zeros(batch, keep, count)
    order = torch.empty(batch, keep, dtype=torch.long, device=quality.device)
    # Gain of a token without residual: below every other gain, which is at least 0, and ordered by quality.
    spent = quality - quality.amax(dim=-1, keepdim=True) - 1
    for step in range(keep):
        gain = torch.where(residual > RANK_TOLERANCE, weight * residual, spent)
        chosen = gain.argmax(dim=-1)
        order[:, step] = chosen
        if step + 1 < keep:
            past = basis[:, :step]
            row = cosine[rows, chosen] - (past[rows, :, chosen].unsqueeze(1) @ past).squeeze(1)
            left = residual[rows, chosen]
            # A token without residual adds no direction to the span.
            scale = torch.where(left > RANK_TOLERANCE, left.rsqrt(), 0)
            row = row * scale.unsqueeze(1)
            basis[:, step] = row
            residual = residual - row * row
        residual[rows, chosen] = 0
        spent[rows, chosen] = -torch.inf
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
    images = [LazyGreedy(*image, keep).run() for image in zip(features.float(), quality.float(), strict=True)]
    return torch.stack(images)


class LazyGreedy:
    """Greedy MAP inference for one image.

    All arrays are in the order of quality, so the tokens considered so far are a prefix of them. The loop is written in
    numpy because it makes about ten calls per step on a few hundred numbers each, and a call costs less in numpy than
    in torch.

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
        self.quality = quality[self.ranked].numpy()
        self.weight = self.quality * self.quality
        self.unit, self.held_unit = torch.empty(count, width), torch.empty(count, width)
        self.cosine = np.empty((count, count), np.float32)  # rows are filled as they are computed
        self.held = 0
        self.slot = np.full(count, -1)  # which row of `cosine` is a token's; -1: not computed yet
        self.basis = np.empty((keep, count), np.float32)
        self.residual, self.gain = np.empty(count, np.float32), np.empty(count, np.float32)
        self.spent = self.quality - self.quality[0] - 1  # gain of a token without residual, as in `greedy_map`
        self.chosen: list[int] = []

    def run(self) -> Tensor:
        """Choose the tokens. Returns [keep] distinct indices, in the order of choice."""
        bound = [*(self.weight * np.float32(SLACK)).tolist(), -np.inf]
        self._widen()
        while len(self.chosen) < self.keep:
            token, best = self._best()
            if best <= bound[self.seen]:
                self._widen()
            else:
                self._choose(token)
        return self.ranked[self.chosen]

    def _best(self) -> tuple[int, float]:
        """Find the token with the largest gain. Of equal ones it is the first in the image. Returns it and its gain."""
        gain, residual = self.gain[: self.seen], self.residual[: self.seen]
        np.multiply(self.weight[: self.seen], residual, out=gain)
        np.copyto(gain, self.spent[: self.seen], where=residual <= RANK_TOLERANCE)
        token = int(gain.argmax())
        best = gain[token]
        equal = (gain == best).nonzero()[0]
        if len(equal) > 1:
            token = int(equal[self.places[equal].argmin()])
        return token, float(best)

    def _choose(self, token: int) -> None:
        """Add a token to those chosen and take its direction out of all residuals."""
        step, seen, basis, left = len(self.chosen), self.seen, self.basis, self.residual[token]
        self.chosen.append(token)
        if left > RANK_TOLERANCE:
            if self.slot[token] < 0:
                self._hold(token)
            row = self.cosine[self.slot[token], :seen] - basis[:step, token] @ basis[:step, :seen]
            row *= left**-0.5
            basis[step, :seen] = row
            row *= row
            self.residual[:seen] -= row
        else:  # the chosen tokens span all others, so the remaining ones are taken in the order of their quality
            basis[step] = 0
        self.residual[token] = 0
        self.spent[token] = -np.inf

    def _hold(self, token: int) -> None:
        """Compute the cosines of a token, and of the tokens that come next by gain, with all tokens considered."""
        seen, start = self.seen, self.held
        gain = np.where(self.slot[:seen] < 0, self.gain[:seen], -np.inf)
        gain[token] = np.inf
        number = min(ROWS, seen - start)
        new = np.argpartition(-gain, number - 1)[:number]
        self.slot[new] = np.arange(start, start + number)
        self.held += number
        held = torch.index_select(self.unit, 0, torch.from_numpy(new), out=self.held_unit[start : start + number])
        self.cosine[start : start + number, :seen] = (held @ self.unit[:seen].T).numpy()

    def _widen(self) -> None:
        """Consider the next block of tokens: compute its cosines with the rows held, and its residuals."""
        from scipy.linalg import solve_triangular  # imported here so that listing the registry does not load scipy

        start, stop = self.seen, min(self.seen + BLOCK, self.count)
        self.seen = stop
        unit = torch.index_select(self.features, 0, self.ranked[start:stop], out=self.unit[start:stop])
        norm = torch.linalg.vector_norm(unit, dim=1)
        unit /= norm.clamp(min=1e-12).unsqueeze(1)
        residual = (norm > 0).float().numpy()  # exactly one, so that rounding does not decide between equal tokens
        if self.chosen:
            self.cosine[: self.held, start:stop] = (self.held_unit[: self.held] @ unit.T).numpy()
            span = self.basis[: len(self.chosen)]
            lower = np.ascontiguousarray(span[:, self.chosen].T)
            rows = self.cosine[self.slot[self.chosen], start:stop]
            span[:, start:stop] = solve_triangular(lower, rows, lower=True, check_finite=False)
            residual -= np.square(span[:, start:stop]).sum(axis=0)
        self.residual[start:stop] = residual
