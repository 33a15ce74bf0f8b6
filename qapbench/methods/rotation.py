"""Orthogonal transforms around linears, which spread the outliers of a few channels over all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, where

from .affine import straight_through
from .formats import Format
from .plans import Transform


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

    @classmethod
    def hadamard(cls, width: int, seed: int, signs: bool) -> Rotation:
        """The Hadamard transform of a width, with random signs or without; `random` beyond powers of two."""
        drawn = cls.random(width, seed)
        mixer = drawn.mixer if len(drawn.mixer) > 1 else torch.ones_like(drawn.mixer)  # it has no sign of its own
        return cls(drawn.signs if signs else torch.ones_like(drawn.signs), mixer)

    @classmethod
    def dense(cls, matrix: Tensor) -> Rotation:
        """The rotation x -> R x of an orthogonal matrix R [n, n]."""
        return cls(torch.ones(len(matrix), dtype=torch.float32), matrix.float())

    @property
    def width(self) -> int:
        """Width n of the vectors."""
        return len(self.signs)

    @property
    def matrix(self) -> Tensor:
        """R as a matrix [n, n] float32."""
        return self(torch.eye(self.width)).mT.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """Compute R x along the last dimension: [..., n] -> [..., n] in float32."""
        return self._mix(_hadamard((x.float() * self.signs.to(x.device)), len(self.mixer)), self.mixer)

    def inverse(self, y: Tensor) -> Tensor:
        """Compute R^T y along the last dimension: [..., n] -> [..., n] in float32."""
        mixed = self._mix(y.float(), self.mixer.mT)
        return _hadamard(mixed, len(self.mixer)) * self.signs.to(y.device)

    def of_parts(self, x: Tensor) -> Tensor:
        """Rotate each part of width n of x [..., parts * n]: the same shape in float32."""
        return self(x) if x.shape[-1] == self.width else self(x.unflatten(-1, (-1, self.width))).flatten(-2)

    def inverse_of_parts(self, y: Tensor) -> Tensor:
        """Undo `of_parts`."""
        whole = y.shape[-1] == self.width
        return self.inverse(y) if whole else self.inverse(y.unflatten(-1, (-1, self.width))).flatten(-2)

    def _mix(self, x: Tensor, mixer: Tensor) -> Tensor:
        """Multiply by `mixer` along the dimension of size q of x [..., q * 2^k]."""
        odd = len(mixer)
        if odd == 1:
            return x * mixer[0, 0].to(x.device)
        rows = x.reshape(-1, odd, x.shape[-1] // odd)
        if mixer.requires_grad:  # it is being learned: speed counts, and no last bit
            return torch.einsum("pq,tqk->tpk", mixer, rows).reshape(x.shape)
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


class Rotated(Transform):
    """Rotation of a linear's input, which may take a norm's gain g over: W x = (W diag(g) R^T) (R (x / g)).

    A rotation whose width divides the input acts on each part of it, such as a head.

    Args:
        ins: R.
        gain: [in], g; None leaves it out.
    """

    def __init__(self, ins: Rotation, gain: Tensor | None = None) -> None:
        self.ins, self.gain = ins, gain

    def input(self, x: Tensor) -> Tensor:
        """Rotate the input, divided by g: [..., in] -> [..., in] in float32."""
        if self.gain is None:
            return self.ins.of_parts(x)
        gain = self.gain.to(x.device)
        return self.ins.of_parts(x.float() / where(gain == 0, 1, gain))  # a channel of gain 0 is 0

    def weight(self, w: Tensor) -> Tensor:
        """Rotate the columns, multiplied by g: [out, in] -> [out, in] in float32."""
        return self.ins.of_parts(w if self.gain is None else w.float() * self.gain.to(w.device))

    def rounded_input(self, format: Format, x: Tensor) -> Tensor:
        """The input after it was rotated, rounded, and rotated back, with the gradient of what was not rounded."""
        rotated = self.input(x)
        back = self.ins.inverse_of_parts(straight_through(rotated, format(rotated.detach())))
        return back if self.gain is None else back * self.gain.to(x.device)

    def rounded_weight(self, format: Format, w: Tensor) -> Tensor:
        """The weight after it was rotated, rounded, and rotated back, with the gradient of what was not rounded."""
        rotated = self.weight(w)
        return self._undone(straight_through(rotated, format(rotated.detach()))).to(w.dtype)

    def _undone(self, w: Tensor) -> Tensor:
        """What `weight` made a rotated weight from."""
        back = self.ins.inverse_of_parts(w)
        if self.gain is None:
            return back
        gain = self.gain.to(w.device)
        return back / where(gain == 0, 1, gain)


class RotatedBoth(Rotated):
    """The same, with the output rotated too, whole or in parts: y = U^T (U W' x') + bias.

    Args:
        ins: R.
        outs: U.
        bias: [out], the linear's bias; None if it has none.
        gain: [in], g; None leaves it out.
    """

    def __init__(self, ins: Rotation, outs: Rotation, bias: Tensor | None = None, gain: Tensor | None = None) -> None:
        super().__init__(ins, gain)
        self.outs, self.bias = outs, bias

    def weight(self, w: Tensor) -> Tensor:
        """Rotate columns and rows: [out, in] -> [out, in] in float32."""
        return self.outs.of_parts(super().weight(w).mT).mT.contiguous()

    def _undone(self, w: Tensor) -> Tensor:
        return super()._undone(self.outs.inverse_of_parts(w.mT).mT)

    def output(self, y: Tensor) -> Tensor:
        """Rotate the output back. The linear has already added its bias, which belongs after U^T."""
        bias = 0 if self.bias is None else self.bias.float()
        return self.outs.inverse_of_parts(y.float() - bias) + bias


def rotated_by(found: Mapping[str, Tensor]) -> Rotated:
    """The transform that the result of a calibration describes.

    Args:
        found: "signs" and "mixer" of R, and what there is of "gain", "out_signs" and "out_mixer" of U, and "bias".
    """
    ins, gain = Rotation(found["signs"], found["mixer"]), found.get("gain")
    if "out_signs" not in found:
        return Rotated(ins, gain)
    return RotatedBoth(ins, Rotation(found["out_signs"], found["out_mixer"]), found.get("bias"), gain)
