"""Gradient descent on orthogonal matrices: the Cayley transform on the Stiefel manifold."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

K = TypeVar("K")

ITERATIONS = 5  # of the fixed point that stands for the inverse in the Cayley transform, as released
TINY = 1e-8


def cayley_step(point: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """One step of Cayley SGD without momentum: a matrix near `point` with less loss, and rows as orthonormal as before.

    With the rows X of `point` normalised and the gradient G, W = A - A^T where A = -G^T X + X^T (X G^T X) / 2, and the
    step is Y = (I - s W / 2)^-1 (I + s W / 2) X^T, with s = min(rate, 1 / ||W||_1). Y is found by iterating
    Y = X^T + s W (X^T + Y) / 2.

    Args:
        point: [n, n], orthogonal.
        gradient: [n, n], of the loss.
        rate: learning rate.

    Returns:
        [n, n], Y^T.

    Source:
        Li, Fuxin and Todorovic, Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform,
        ICLR 2020, algorithm 1; started from -s G^T as SpinQuant does.
    """
    x = point / point.norm(dim=1, keepdim=True).clamp(min=TINY)
    along = -gradient.mT
    a = along @ x
    a = a - x.mT @ (x @ a) / 2
    w = a - a.mT
    step = min(rate, 1 / (float(w.abs().sum(dim=0).max()) + TINY))
    y = x.mT + step * along
    for _ in range(ITERATIONS):
        y = x.mT + step * w @ (x.mT + y) / 2
    return y.mT


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal matrix [n, n] that differs least in squares: U V^T of a matrix U S V^T, in float64."""
    u, _, v = torch.linalg.svd(matrix.double())
    return (u @ v).to(matrix.dtype)


def descend(
    points: Mapping[K, Tensor],
    losses: Callable[[Mapping[K, Tensor], int], Iterable[Tensor]],
    steps: int,
    lr: float,
) -> dict[K, Tensor]:
    """Orthogonal matrices with less loss, by Cayley SGD with a rate that falls from `lr` to 0 as a cosine.

    Args:
        points: the matrices to start from, [n, n] each.
        losses: gives losses of matrices at a step, one after another, of which the mean counts. The graph of one is
            freed before the next is asked for.
        steps: number of steps.
        lr: learning rate.

    Returns:
        The matrices after the last step, made orthogonal.
    """
    for step in range(steps):
        points = {key: point.detach().requires_grad_(True) for key, point in points.items()}
        count = 0
        with torch.enable_grad():
            for loss in losses(points, step):
                loss.backward(inputs=list(points.values()))
                count += 1
        rate = lr * (1 + math.cos(math.pi * step / steps)) / 2
        moved = {k: cayley_step(p.detach(), p.grad / count, rate) for k, p in points.items() if p.grad is not None}
        points = {**points, **moved}
    return {key: nearest_orthogonal(point.detach()) for key, point in points.items()}
