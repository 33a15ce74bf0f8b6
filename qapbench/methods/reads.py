"""How a language model first reads a visual token, for metrics that look at more than the token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FirstReads:
    """The first layer's norm and its linears that read the norm's output, all in full precision whatever is quantized.

    Attributes:
        normed: tokens [B, N, D] -> the input of these linears [B, N, D], in float32.
        weights: weight [O, D] of each of these linears in float32: query, key and value in this order.
        attention: inputs [B, N, D] -> attention [B, N] of the mean query of an image's tokens to each of them, before
            the rotary embedding, averaged over heads; it sums to 1 over the image.
    """

    normed: Callable[[Tensor], Tensor]
    weights: tuple[Tensor, ...]
    attention: Callable[[Tensor], Tensor]
