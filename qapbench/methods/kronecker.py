"""Invertible maps of a linear's input that are Kronecker products of two small matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .plans import Transform


def near_square(width: int) -> tuple[int, int]:
    """Factors l <= r of a width that are as close as can be, of one parity if there are such: 192 is 12 x 16."""
    pairs = [(small, width // small) for small in range(1, int(width**0.5) + 1) if width % small == 0]
    return max(pairs, key=lambda pair: ((pair[1] - pair[0]) % 2 == 0, pair[0]))


@dataclass(frozen=True)
class Matrix:
    """An invertible matrix P with the transpose of its inverse.

    Attributes:
        value: [n, n], P.
        dual: [n, n], P^-T.
    """

    value: Tensor
    dual: Tensor


class LearnedMatrix:
    """An invertible matrix U diag(s) V^T to learn. U and V stay orthogonal, as Cayley transforms of skew matrices.

    Args:
        size: n.
        draw: draws the orthogonal matrices at which U and V start; s starts at 1.

    Attributes:
        parameters: what is learned: two matrices [n, n], whose skew parts count, and s [n].
    """

    def __init__(self, size: int, draw: torch.Generator) -> None:
        gauss = torch.randn(2, size, size, generator=draw, dtype=torch.float64)
        q, r = torch.linalg.qr(gauss)
        self._start = q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
        self.parameters = [torch.zeros(2, size, size, dtype=torch.float32), torch.ones(size, dtype=torch.float32)]

    def matrix(self, dtype: torch.dtype = torch.float32) -> Matrix:
        """The matrix, as a function of the parameters."""
        free, s = (parameter.to(dtype) for parameter in self.parameters)
        skew, identity = (free - free.mT) / 2, torch.eye(free.shape[-1], dtype=dtype)
        u, v = torch.linalg.solve(identity - skew, identity + skew) @ self._start.to(dtype)
        return Matrix(u * s @ v.mT, u / s @ v.mT)


class Kronecker(Transform):
    """The map x -> (x d) (P1 kron P2) of a linear's input, and W -> (W / d) (P1 kron P2)^-T of its weight.

    Args:
        left: P1, [l, l].
        right: P2, [r, r].
        scale: [l r], d.
    """

    def __init__(self, left: Matrix, right: Matrix, scale: Tensor) -> None:
        self.left, self.right, self.scale = left, right, scale

    def input(self, x: Tensor) -> Tensor:
        """Map the input: [..., in] -> [..., in] in float32."""
        return _product(x.float() * self.scale.to(x.device), self.left.value, self.right.value)

    def weight(self, w: Tensor) -> Tensor:
        """Map the weight: [out, in] -> [out, in] in float32."""
        return _product(w.float() / self.scale.to(w.device), self.left.dual, self.right.dual)

    def rows(self, w: Tensor) -> Tensor:
        """What becomes of the rows of a weight before it is rounded: [out, in] -> [out, in]."""
        return w

    def rows_undone(self, w: Tensor) -> Tensor:
        """Undo `rows`."""
        return w


class KroneckerHeads(Kronecker):
    """The same, with each head of the output multiplied by a matrix P, which is undone behind the linear.

    Args:
        left: P1.
        right: P2.
        scale: d.
        head: P, [width of a head, width of a head].
        bias: [out], the linear's bias; None if it has none.
    """

    def __init__(self, left: Matrix, right: Matrix, scale: Tensor, head: Matrix, bias: Tensor | None) -> None:
        super().__init__(left, right, scale)
        self.head, self.bias = head, bias

    def weight(self, w: Tensor) -> Tensor:
        """Map the weight's columns and rows: [out, in] -> [out, in] in float32."""
        return self.rows(super().weight(w))

    def rows(self, w: Tensor) -> Tensor:
        """Multiply the rows of each head by P^T."""
        return _heads(w.mT, self.head.value).mT.contiguous()

    def rows_undone(self, w: Tensor) -> Tensor:
        """Multiply the rows of each head by P^-T."""
        return _heads(w.mT, self.head.dual.mT).mT

    def output(self, y: Tensor) -> Tensor:
        """Undo P. The linear has already added its bias, which belongs behind that."""
        bias = 0 if self.bias is None else self.bias.float()
        return _heads(y.float() - bias, self.head.dual.mT) + bias


def kronecker_by(found: Mapping[str, Tensor]) -> Kronecker:
    """The transform that the result of a calibration describes.

    Args:
        found: "left" and "right", each [2, n, n] with P and P^-T, "scale", and what there is of "head" and "bias".
    """
    left, right = Matrix(*found["left"]), Matrix(*found["right"])
    if "head" not in found:
        return Kronecker(left, right, found["scale"])
    return KroneckerHeads(left, right, found["scale"], Matrix(*found["head"]), found.get("bias"))


def _product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Multiply each x [..., l r] by (left kron right): left^T X right with x as X [l, r]."""
    rows = x.reshape(-1, len(left), len(right))
    # One small product per row: in a single large product, a row's bits could depend on the number of rows.
    return torch.bmm(torch.bmm(_each(left.mT, rows), rows), _each(right, rows)).reshape(x.shape)


def _heads(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply each head of x [..., heads * n] by a matrix [n, n] from the right."""
    rows = x.reshape(-1, x.shape[-1] // len(matrix), len(matrix))
    return torch.bmm(rows, _each(matrix, rows)).reshape(x.shape)


def _each(matrix: Tensor, rows: Tensor) -> Tensor:
    """The matrix for each row, without a copy."""
    return matrix.to(rows.device).expand(len(rows), -1, -1)
