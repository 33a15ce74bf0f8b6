"""Metrics as a pruning calls them, with the first linears of a random language model for those that look at one."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from qapbench import FirstReads, metrics


def reads_of(width: int) -> FirstReads:
    """First linears of a random language model of this width."""
    generator = torch.Generator().manual_seed(5)
    weights = tuple(torch.randn(8, width, generator=generator) for _ in range(3))

    def normed(tokens: Tensor) -> Tensor:
        return tokens.float() * torch.rsqrt(tokens.float().square().mean(-1, keepdim=True) + 1e-6)

    def attention(x: Tensor) -> Tensor:
        query, key = x @ weights[0].T, x @ weights[1].T
        return (query.mean(1, keepdim=True) @ key.mT / 8**0.5).softmax(-1)[:, 0]

    return FirstReads(normed, weights, attention)


def create(name: str, width: int) -> Callable[[Tensor], Tensor]:
    """The metric as a pruning calls it, with a model of this width if it needs one."""
    measure = metrics.create(name)
    return functools.partial(measure, reads=reads_of(width)) if measure.needs else measure
