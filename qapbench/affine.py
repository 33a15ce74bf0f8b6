"""The arithmetic that all fake quantization here rests on: uniform levels, one scale per group."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import first_line

Divisor = Literal["qmax", "half"]
ZeroPoint = Literal["in_range", "clamped", "free"]

BLOCK = 2**19  # values computed at a time on a CPU: few enough to stay in its cache, enough to hide the calls
COMPILE = "QAPBENCH_COMPILE"


def fake_quantize(
    x: Tensor,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = False,
    divisor: Divisor = "qmax",
    zero_point: ZeroPoint = "in_range",
) -> Tensor:
    """Quantize and dequantize along the last dimension, in float32, returned in x's dtype.

    By default, symmetric: scale = absmax / (2^(b-1) - 1), levels -(2^(b-1)-1) .. 2^(b-1)-1; asymmetric: range
    [min(x, 0), max(x, 0)] over 2^b levels with an integer zero point, as integer kernels and compressed-tensors /
    torchao have it. `Levels` has the other conventions. Rounding is half to even. A group of one repeated value is
    exact. Gradients pass rounding unchanged (straight-through).

    With QAPBENCH_COMPILE=1 in the environment one compiled pass does the same, to the bit; it needs a C++ compiler.

    Args:
        x: [..., D], any floating dtype. Rows never share a scale.
        bits: number of bits, at least 2.
        group_size: channels that share a scale; None is the whole row. Where it does not divide D the last
            group is shorter.
    """
    levels = Levels(bits, symmetric, divisor, zero_point)
    if x.requires_grad and torch.is_grad_enabled():
        return torch.cat([levels.of(part)(part).flatten(1) for part in grouped(x, group_size)], dim=1).view_as(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    quantize: Callable[[Tensor, Levels, Tensor], None] = _eager if x.is_cpu else _whole
    if os.environ.get(COMPILE) == "1" and not torch.compiler.is_compiling():
        quantize = _compiled() or quantize
    for values, target in zip(grouped(x, group_size), grouped(out, group_size), strict=True):
        quantize(values, levels, target)
    return out


@dataclass(frozen=True)
class Levels:
    """How a range becomes uniform levels: what differs between published codes.

    Attributes:
        bits: number of bits, at least 2.
        symmetric: zero point 0.
        divisor: of a symmetric scale. "qmax": absmax / (2^(b-1) - 1), so that the largest value is a level and the
            lowest level stays unused (SmoothQuant, MBQ, MQuant, LLM.int8()); "half": absmax / (2^(b-1) - 1/2) and
            levels -2^(b-1) .. 2^(b-1)-1 (GPTQ, compressed-tensors, torchao).
        zero_point: of asymmetric levels. "in_range": the range is widened to hold zero, so that zero is a level;
            "clamped": the range is [min, max] and the zero point clamped to the levels, which cuts off groups of one
            sign (AWQ, MBQ); "free": the same with any integer zero point (OmniQuant, Q-VLM).
    """

    bits: int
    symmetric: bool = False
    divisor: Divisor = "qmax"
    zero_point: ZeroPoint = "in_range"

    @property
    def span(self) -> tuple[int, int]:
        """Lowest and highest level."""
        half = 2 ** (self.bits - 1)
        if not self.symmetric:
            return 0, 2 * half - 1
        return (1 - half if self.divisor == "qmax" else -half), half - 1

    def grid(self, low: Tensor, high: Tensor) -> Grid:
        """The levels of the ranges [low, high], float32 of any one shape; differentiable where rounding is not.

        An empty range gets a scale of which its one value is a multiple.
        """
        lowest, highest = self.span
        floor, ceiling = low, high
        if self.symmetric:
            scale = torch.maximum(-low, high) / (highest + (0.5 if self.divisor == "half" else 0))
        else:
            if self.zero_point == "in_range":
                floor, ceiling = low.clamp(max=0), high.clamp(min=0)
            scale = (ceiling - floor) / highest
        scale = torch.where(low == high, low.abs(), scale)
        # All zeros, or too close to it for a scale: dividing by 1 gives zero without a NaN.
        scale = scale.masked_fill(scale == 0, 1)
        if self.symmetric:
            return Grid(scale, torch.zeros_like(scale), lowest, highest)
        zero = -round_through(floor / scale)
        return Grid(scale, zero.clamp(0, highest) if self.zero_point == "clamped" else zero, lowest, highest)

    def reaches_past(self, low: Tensor, high: Tensor, grid: Grid) -> bool:
        """Whether any value in the ranges of `grid` would round to a level that there is not."""
        if self.symmetric:
            return self.divisor == "half"
        above = torch.div(high, grid.scale).round_().add_(grid.zero).gt(grid.highest).any()
        if self.zero_point == "in_range":
            return bool(above)
        return bool(above or torch.div(low, grid.scale).round_().add_(grid.zero).lt(grid.lowest).any())

    def of(self, x: Tensor) -> Grid:
        """The grid of x's own range along the last dimension, [..., 1]."""
        return self.grid(*_ends(x.float()))


class HasLevels(Protocol):
    @property
    def levels(self) -> Levels: ...


class Grid(NamedTuple):
    """Fixed levels: value = (level - zero) * scale for integer levels lowest..highest.

    `scale` and `zero` are float32 and broadcast against what is quantized; zero holds integers.
    """

    scale: Tensor
    zero: Tensor
    lowest: int
    highest: int

    @classmethod
    def of(cls, x: Tensor, format: HasLevels) -> Grid:
        """The grid of each row of x [..., G]; one row is one group, whatever the format's group size."""
        return format.levels.of(x)

    def __call__(self, x: Tensor) -> Tensor:
        """Quantize-dequantize: the nearest level's value, in x's dtype. Gradients pass rounding unchanged."""
        rounded = round_through(x.float() / self.scale)
        clamped = rounded.clamp(self.lowest - self.zero, self.highest - self.zero)
        return _finite(clamped * self.scale, x.dtype).to(x.dtype)


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def round_through(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes as if it were not there (straight-through estimator)."""
    rounded: Tensor = _RoundThrough.apply(x) if x.requires_grad else x.round()
    return rounded


def grouped(x: Tensor, group_size: int | None) -> list[Tensor]:
    """Views of [..., D] as [R, G, group_size], and [R, 1, rest] where the size leaves a shorter last group."""
    width = x.shape[-1]
    group = min(group_size or width, width)
    rows = x.reshape(-1, width)
    body = width - width % group
    views = [rows[:, :body].unflatten(-1, (-1, group))]
    return views if body == width else [*views, rows[:, body:].unsqueeze(1)]


def _whole(x: Tensor, levels: Levels, out: Tensor) -> None:
    """[R, G, D] in one go: what compiles into one pass, and what a GPU takes without waiting for the host."""
    out.copy_(levels.of(x)(x))


def _eager(x: Tensor, levels: Levels, out: Tensor) -> None:
    """The same in place, some rows at a time, so that every pass but the first reads from cache."""
    rows = max(1, BLOCK // max(1, x.shape[1] * x.shape[2]))
    own = x.dtype == torch.float32
    scratch = None if own else torch.empty(min(rows, len(x)), *x.shape[1:])
    for block, target in zip(x.split(rows), out.split(rows), strict=True):
        values = block if scratch is None else scratch[: len(block)].copy_(block)
        low, high = _ends(values)
        grid = levels.grid(low, high)
        work = torch.div(values, grid.scale, out=target if own else values).round_()
        # Seldom does a range reach past its levels, and a look at its ends is cheaper than two passes over all of it.
        if levels.reaches_past(low, high, grid):
            torch.minimum(work, grid.highest - grid.zero, out=work)
            torch.maximum(work, grid.lowest - grid.zero, out=work)
        work.mul_(grid.scale)
        if not own:
            target.copy_(_finite(work, x.dtype))


@functools.cache
def _compiled() -> Callable[[Tensor, Levels, Tensor], None] | None:
    """`_whole` compiled; None, said once, where that cannot be."""
    probe = torch.zeros(2, 2, 128)
    try:
        compiled: Callable[[Tensor, Levels, Tensor], None] = torch.compile(_whole)
        compiled(probe, Levels(4), torch.empty_like(probe))
    except Exception as error:
        message = f"{COMPILE}=1, but torch.compile fails here ({first_line(error)}): fake quantization runs eager"
        warnings.warn(message, stacklevel=3)
        return None
    return compiled


def _ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest along the last dimension, [..., 1]."""
    # Two reductions that are vectorised: aminmax, which is not, takes ten times as long on a CPU.
    return x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)


def _finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 levels about to become `dtype`: where one is past its largest value, that value."""
    if dtype != torch.float16:
        return x
    largest = torch.finfo(dtype).max
    return torch.where(x.isinf(), x, x.clamp(-largest, largest))
