"""Fast random orthogonal transforms, which spread the outliers of a few channels over all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """A random orthogonal map x -> R x of vectors of width n = q 2^k with q odd.

    R multiplies each channel by a random sign, views the vector as [q, 2^k], applies the Walsh-Hadamard transform along
    the dimension of size 2^k and a random orthogonal matrix along the dimension of size q, like the Kronecker products
    of QuIP (section 4.1) and QuaRot. This takes n (k + q) operations per vector instead of n^2. Computed in float32.

    Attributes:
        signs: [n], each 1 or -1.
        mixer: [q, q], orthogonal.
    """

    signs: Tensor
    mixer: Tensor

    @classmethod
    def random(cls, width: int, seed: int) -> Rotation:
        """Draw a rotation. The same width and seed give the same rotation on every machine."""
        draw = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (width,), generator=draw).float() * 2 - 1
        odd = _odd(width)
        gauss = torch.randn(odd, odd, generator=draw, dtype=torch.float64)
        q, r = torch.linalg.qr(gauss)
        # Multiplied by the signs of r's diagonal, q is distributed uniformly over the orthogonal matrices.
        return cls(signs, (q * r.diagonal().sign()).float())

    def __call__(self, x: Tensor) -> Tensor:
        """Compute R x along the last dimension: [..., n] -> [..., n] in float32."""
        return self._mix(_hadamard((x.float() * self.signs.to(x.device)), len(self.mixer)), self.mixer)

    def inverse(self, y: Tensor) -> Tensor:
        """Compute R^T y along the last dimension: [..., n] -> [..., n] in float32."""
        mixed = self._mix(y.float(), self.mixer.mT)
        return _hadamard(mixed, len(self.mixer)) * self.signs.to(y.device)

    def _mix(self, x: Tensor, mixer: Tensor) -> Tensor:
        """Multiply by `mixer` along the dimension of size q of x [..., q * 2^k]."""
        odd = len(mixer)
        if odd == 1:
            return x * mixer[0, 0].to(x.device)
        rows = x.reshape(-1, odd, x.shape[-1] // odd)
        # One small product per row: in a single large product, a row's bits could depend on the number of rows.
        return torch.bmm(mixer.to(x.device).expand(len(rows), -1, -1), rows).reshape(x.shape)


def rotation_flops(width: int) -> int:
    """FLOPs of rotating one vector of width n = q 2^k: k additions per channel, and 2 q for the mixer if q > 1."""
    odd = _odd(width)
    halvings = (width // odd).bit_length() - 1
    return width * (halvings + (2 * odd if odd > 1 else 0))


def _odd(width: int) -> int:
    """The odd factor q of a width q 2^k."""
    return width // (width & -width)


def _hadamard(x: Tensor, odd: int) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of each of the `odd` blocks of n / odd channels of x [..., n]."""
    size = x.shape[-1] // odd
    y, half = x.unflatten(-1, (odd, size)), 1
    while half < size:
        pairs = y.unflatten(-1, (-1, 2, half))
        one, other = pairs[..., 0, :], pairs[..., 1, :]
        y, half = torch.stack([one + other, one - other], dim=-2).flatten(-3), half * 2
    return y.flatten(-2) / math.sqrt(size)
