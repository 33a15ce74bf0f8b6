"""Random orthogonal transforms that cost n log n: what spreads outliers over all channels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """x -> R x, R orthogonal: random signs, a Hadamard transform, and a random orthogonal matrix where it has to be.

    The width n = q 2^k, q odd, is seen as [q, 2^k]: the Walsh-Hadamard transform runs along 2^k, the orthogonal
    matrix along q (as the Kronecker products of QuIP, section 4.1, and of QuaRot). Computed in float32.

    Attributes:
        signs: [n], each 1 or -1.
        mixer: [q, q], orthogonal.
    """

    signs: Tensor
    mixer: Tensor

    @classmethod
    def random(cls, width: int, seed: int) -> Rotation:
        """The same for the same width and seed, on every machine."""
        draw = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (width,), generator=draw).float() * 2 - 1
        odd = width // (width & -width)
        gauss = torch.randn(odd, odd, generator=draw, dtype=torch.float64)
        q, r = torch.linalg.qr(gauss)  # uniform over orthogonal matrices once the signs of r are taken out
        return cls(signs, (q * r.diagonal().sign()).float())

    def __call__(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n] float32."""
        return self._mix(_hadamard((x.float() * self.signs.to(x.device)), len(self.mixer)), self.mixer)

    def inverse(self, y: Tensor) -> Tensor:
        """[..., n] -> [..., n] float32: R^T y."""
        mixed = self._mix(y.float(), self.mixer.mT)
        return _hadamard(mixed, len(self.mixer)) * self.signs.to(y.device)

    def _mix(self, x: Tensor, mixer: Tensor) -> Tensor:
        odd = len(mixer)
        if odd == 1:
            return x * mixer[0, 0].to(x.device)
        rows = x.reshape(-1, odd, x.shape[-1] // odd)
        # A product a row: folded into one matrix product its bits could depend on how many rows there are.
        return torch.bmm(mixer.to(x.device).expand(len(rows), -1, -1), rows).reshape(x.shape)


def _hadamard(x: Tensor, odd: int) -> Tensor:
    """Orthonormal Walsh-Hadamard transform along the last n / odd channels of x [..., n]."""
    size = x.shape[-1] // odd
    y, half = x.unflatten(-1, (odd, size)), 1
    while half < size:
        pairs = y.unflatten(-1, (-1, 2, half))
        one, other = pairs[..., 0, :], pairs[..., 1, :]
        y, half = torch.stack([one + other, one - other], dim=-2).flatten(-3), half * 2
    return y.flatten(-2) / math.sqrt(size)
