"""Amounts of work: FLOPs by the precision that they are done in, and the bytes that go with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

FULL = 16  # bits of what is not quantized, whatever the dtype


class Precision(NamedTuple):
    """What the two sides of a matrix product are held in.

    Attributes:
        weights: bits of one side: the weights, or the keys or values of attention.
        activations: bits of the other side.
        floating: whether both have a floating-point format, as every side of 16 bits has.
    """

    weights: float = FULL
    activations: float = FULL
    floating: bool = False


@dataclass(frozen=True)
class Work:
    """The work of one stage.

    Attributes:
        products: FLOPs of matrix products and convolutions by their precision. A multiplication and an addition are two
            FLOPs, as `torch.utils.flop_counter` counts them; nothing else is counted.
        bytes: what has to be read or written at least: weights once, and the KV cache.
    """

    products: Mapping[Precision, float] = field(default_factory=dict)
    bytes: float = 0.0

    @property
    def flops(self) -> float:
        """FLOPs in any precision."""
        return sum(self.products.values())

    @property
    def bops(self) -> float:
        """FLOPs x bits of one side x bits of the other / 256: equal to the FLOPs where nothing is quantized."""
        return sum(n * kind.weights * kind.activations for kind, n in self.products.items()) / FULL**2

    @property
    def intensity(self) -> float:
        """FLOPs per byte; infinite if no byte is counted."""
        return self.flops / self.bytes if self.bytes else float("inf")

    @staticmethod
    def total(parts: Iterable[Work]) -> Work:
        """The sum of some amounts of work."""
        products: dict[Precision, float] = {}
        moved = 0.0
        for part in parts:
            moved += part.bytes
            for kind, n in part.products.items():
                products[kind] = products.get(kind, 0.0) + n
        return Work(products, moved)


def work(flops: float, precision: Precision = Precision()) -> Work:  # noqa: B008 (it is immutable)
    """Products of one precision."""
    return Work({precision: flops}) if flops else Work()
