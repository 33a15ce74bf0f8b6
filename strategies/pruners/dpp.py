"""Greedy MAP inference of a determinantal point process (Chen et al. 2018, arXiv 1709.05135).

The kernel is K_ij = q_i S_ij q_j, with S the cosine of features and q their quality. The gain of a token is q_i^2 times
the squared residual of its unit vector outside the span of those chosen, so quality stays out of the recursion and a
quality of zero is harmless. Ties go to the lower index; tokens without residual left are taken in order of quality.

Two ways to the same answer: `greedy_map` from a whole cosine matrix, batched, for a GPU; `greedy_map_lazy` for a CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

RANK_TOLERANCE = 1e-6  # of a unit vector's squared residual: float32 cannot tell less from zero
BLOCK = 64  # tokens that the lazy way looks at in one go: enough for a matmul to be one
ROWS = 32  # and whose cosines it computes in one go
SLACK = 1 + 1e-5  # a unit vector's squared norm in float32 may exceed one by less


def greedy_map(cosine: Tensor, quality: Tensor, keep: int) -> Tensor:
    """All images in step.

    Args:
        cosine: [B, N, N] similarity of unit vectors.
        quality: [B, N], not negative.

    Returns:
        [B, keep] distinct indices in the order of choice.
    """
    batch, count = quality.shape
    rows = torch.arange(batch, device=quality.device)
    weight = quality * quality
    residual = (cosine.diagonal(dim1=-2, dim2=-1) > 0.5).to(quality.dtype)  # one: no rounding decides between equals
    basis = cosine.new_zeros(batch, keep, count)
    order = torch.empty(batch, keep, dtype=torch.long, device=quality.device)
    # Below every gain (>= 0), and ordered by quality: what an exhausted token is worth.
    spent = quality - quality.amax(dim=-1, keepdim=True) - 1
    for step in range(keep):
        gain = torch.where(residual > RANK_TOLERANCE, weight * residual, spent)
        chosen = gain.argmax(dim=-1)
        order[:, step] = chosen
        if step + 1 < keep:
            past = basis[:, :step]
            row = cosine[rows, chosen] - (past[rows, :, chosen].unsqueeze(1) @ past).squeeze(1)
            left = residual[rows, chosen]
            scale = torch.where(left > RANK_TOLERANCE, left.rsqrt(), 0)  # past the rank there is no direction to take
            row = row * scale.unsqueeze(1)
            basis[:, step] = row
            residual = residual - row * row
        residual[rows, chosen] = 0
        spent[rows, chosen] = -torch.inf
    return order


def greedy_map_lazy(features: Tensor, quality: Tensor, keep: int) -> Tensor:
    """The same, image by image, from features [B, N, D] of any length on a CPU, where the cosine matrix is what costs.

    Of that matrix two parts are never needed. Columns: no gain exceeds q^2, so tokens are looked at in order of
    quality, a block at a time, and only while the next one's q^2 may beat the best gain. Rows: only those of tokens
    that are chosen, which are computed together with those of the tokens that come next by gain. An image is never
    seen beside another, so no batch can change it.
    """
    images = [LazyGreedy(*image, keep).run() for image in zip(features.float(), quality.float(), strict=True)]
    return torch.stack(images)


class LazyGreedy:
    """One image. Arrays are in order of quality: what was seen is a prefix of them.

    numpy rather than torch: the loop is some ten calls a step on a few hundred numbers, and a call is what costs.
    """

    def __init__(self, features: Tensor, quality: Tensor, keep: int) -> None:
        count, width = features.shape
        self.ranked = quality.argsort(descending=True, stable=True)
        self.places = self.ranked.numpy()
        self.features, self.keep, self.count, self.seen = features, keep, count, 0
        self.quality = quality[self.ranked].numpy()
        self.weight = self.quality * self.quality
        self.unit, self.held_unit = torch.empty(count, width), torch.empty(count, width)
        self.cosine = np.empty((count, count), np.float32)  # filled row by row, where `slot` says
        self.held = 0
        self.slot = np.full(count, -1)
        self.basis = np.empty((keep, count), np.float32)
        self.residual, self.gain = np.empty(count, np.float32), np.empty(count, np.float32)
        self.spent = self.quality - self.quality[0] - 1  # as above
        self.chosen: list[int] = []

    def run(self) -> Tensor:
        """[keep] distinct indices in the order of choice."""
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
        """The token of the largest gain, of equals the one that is first in the image, and that gain."""
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
        else:  # past the rank, where everything was seen: the rest goes by quality
            basis[step] = 0
        self.residual[token] = 0
        self.spent[token] = -np.inf

    def _hold(self, token: int) -> None:
        """Cosines of a token and of those that are next by gain."""
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
        """Look at the next block: its cosines with the rows held, and what is left of it outside the span."""
        from scipy.linalg import solve_triangular  # imported here: the registry is listed without it

        start, stop = self.seen, min(self.seen + BLOCK, self.count)
        self.seen = stop
        unit = torch.index_select(self.features, 0, self.ranked[start:stop], out=self.unit[start:stop])
        norm = torch.linalg.vector_norm(unit, dim=1)
        unit /= norm.clamp(min=1e-12).unsqueeze(1)
        residual = (norm > 0).float().numpy()  # one to the bit: no rounding decides between equals
        if self.chosen:
            self.cosine[: self.held, start:stop] = (self.held_unit[: self.held] @ unit.T).numpy()
            span = self.basis[: len(self.chosen)]
            lower = np.ascontiguousarray(span[:, self.chosen].T)
            rows = self.cosine[self.slot[self.chosen], start:stop]
            span[:, start:stop] = solve_triangular(lower, rows, lower=True, check_finite=False)
            residual -= np.square(span[:, start:stop]).sum(axis=0)
        self.residual[start:stop] = residual
