"""Quantize-dequantize arithmetic with uniform levels and one scale per group: the basis of all fake quantization."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from qapbench.errors import first_line

from . import affine_kernel

Divisor = Literal["qmax", "half", "full"]
ZeroPoint = Literal["in_range", "clamped", "free"]

# Values quantized at a time on a CPU: few enough to stay in its cache, enough that the cost of the calls is negligible.
BLOCK = 2**19
LOOPS_BLOCK = 2**22  # the same for the compiled loops, which read a value only twice
SMALLEST = torch.finfo(torch.float32).tiny  # smallest scale of a range
LARGEST = torch.finfo(
    torch.bfloat16
).max  # largest value of a level: also bfloat16, which ends before float32, holds it
COMPILE = "QAPBENCH_COMPILE"  # environment variable; "1" compiles fake quantization


def fake_quantize(
    x: Tensor,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = False,
    divisor: Divisor = "qmax",
    zero_point: ZeroPoint = "in_range",
) -> Tensor:
    """Quantize x to uniform levels along its last dimension and convert the levels back to floating point.

    The arithmetic is float32. With the default conventions, symmetric levels have the scale absmax / (2^(b-1) - 1) and
    run from -(2^(b-1) - 1) to 2^(b-1) - 1; asymmetric levels cover the range [min(x, 0), max(x, 0)] with 2^b levels and
    have an integer zero point, as in integer kernels, compressed-tensors and torchao. `Levels` describes the other
    conventions. Ties are rounded to the even level. A group whose values are all equal is reproduced exactly. A group
    with a NaN or an infinity becomes NaN as a whole; finite values stay finite. Gradients pass through the rounding
    unchanged (straight-through estimator).

    If the environment variable QAPBENCH_COMPILE is "1", compiled loops do it with bit-identical results: on a CPU those
    of `affine_kernel`, elsewhere those that torch.compile makes of it. Both need a compiler.

    Args:
        x: [..., D], any floating dtype. Rows never share a scale.
        bits: number of bits, at least 2.
        group_size: consecutive channels that share a scale; None puts the whole row into one group. If it does not
            divide D, the last group is shorter.
        symmetric: whether the zero point is 0.
        divisor: convention for the scale of symmetric levels; see `Levels`.
        zero_point: convention for the range of asymmetric levels; see `Levels`.

    Returns:
        A tensor of x's shape and dtype.
    """
    levels = Levels(bits, symmetric, divisor, zero_point)
    if x.requires_grad and torch.is_grad_enabled():
        return torch.cat([levels.of(part)(part).flatten(1) for part in grouped(x, group_size)], dim=1).view_as(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    quantize: Callable[[Tensor, Levels, Tensor], None] = _eager if x.is_cpu else _whole
    if os.environ.get(COMPILE) == "1" and not torch.compiler.is_compiling():
        quantize = _in_loops if x.is_cpu else _compiled() or quantize
    for values, target in zip(grouped(x, group_size), grouped(out, group_size), strict=True):
        quantize(values, levels, target)
    return out


@dataclass(frozen=True)
class Levels:
    """Convention by which a range of values becomes uniform levels. Published codes differ in it.

    Attributes:
        bits: number of bits, at least 2.
        symmetric: whether the zero point is 0.
        divisor: convention for a symmetric scale. "qmax": the scale is absmax / (2^(b-1) - 1), so the largest value is
            a level and the lowest level stays unused (SmoothQuant, MBQ, LLM.int8()). "half": the scale is
            absmax / (2^(b-1) - 1/2) and the levels are -2^(b-1) to 2^(b-1) - 1 (GPTQ, compressed-tensors, torchao).
            "full": the levels are the same, and the scale is max(-min / 2^(b-1), max / (2^(b-1) - 1)), so that both
            ends of the range are covered (MQuant).
        zero_point: convention for asymmetric levels. "in_range": the range is widened to contain zero, so that zero is
            a level. "clamped": the range is [min, max] and the zero point is clamped to the levels, which cuts off
            groups whose values all have the same sign (AWQ, MBQ). "free": the range is [min, max] and the zero point
            may be any integer (OmniQuant, Q-VLM).
    """

    bits: int
    symmetric: bool = False
    divisor: Divisor = "qmax"
    zero_point: ZeroPoint = "in_range"

    @property
    def span(self) -> tuple[int, int]:
        """Lowest and highest level, as integers."""
        half = 2 ** (self.bits - 1)
        if not self.symmetric:
            return 0, 2 * half - 1
        return (1 - half if self.divisor == "qmax" else -half), half - 1

    @property
    def reach(self) -> tuple[float, float]:
        """How many scales the lower and the upper end of a symmetric range are away from zero."""
        half = 2 ** (self.bits - 1)
        return {"qmax": (half - 1, half - 1), "half": (half - 0.5, half - 0.5), "full": (half, half - 1)}[self.divisor]

    def grid(self, low: Tensor, high: Tensor) -> Grid:
        """Compute scales and zero points for the ranges [low, high].

        A range that contains a single value (low == high) gets that value's magnitude as its scale, so the value is
        reproduced exactly. No other scale is below the smallest normal number of float32, because below it scales would
        themselves be coarse. A range with an infinite or NaN end makes NaN of every value. Gradients pass through the
        rounding of the zero point unchanged.

        Args:
            low: lowest value of each range, float32 of any shape.
            high: highest value of each range, of the same shape.

        Returns:
            A grid whose `scale` and `zero` have the shape of the ranges.
        """
        lowest, highest = self.span
        floor, ceiling = low, high
        if self.symmetric:
            below, above = self.reach
            scale = torch.maximum(-low / below, high / above)
        else:
            if self.zero_point == "in_range":
                floor, ceiling = low.clamp(max=0), high.clamp(min=0)
            width = ceiling - floor
            # Where the width of the range overflows, its parts do not.
            scale = torch.where(width == torch.inf, ceiling / highest - floor / highest, width / highest)
        scale = torch.where(low == high, low.abs(), scale.clamp(min=SMALLEST))
        scale = scale.masked_fill(scale == 0, 1)  # a range of zeros: dividing by 1 gives zeros instead of NaNs
        if self.symmetric:
            return Grid(scale, torch.zeros_like(scale), lowest, highest)
        zero = -round_through(floor / scale)
        return Grid(scale, zero.clamp(0, highest) if self.zero_point == "clamped" else zero, lowest, highest)

    def reaches_past(self, low: Tensor, high: Tensor, grid: Grid) -> bool:
        """Whether values of the ranges could round to a level outside the span, so that clamping is needed.

        May be True although no value does: the symmetric levels of divisor "half" always count as needing it.

        Args:
            low: lowest value of each range, as `grid` was given it.
            high: highest value of each range.
            grid: the grid of these ranges.
        """
        if bool((grid.scale > LARGEST / 2 ** (self.bits + 1)).any()):
            return True  # levels may lie beyond the largest number
        if self.symmetric:
            return self.divisor == "half"
        above = torch.div(high, grid.scale).round_().add_(grid.zero).gt(grid.highest).any()
        if self.zero_point == "in_range":
            return bool(above)
        return bool(above or torch.div(low, grid.scale).round_().add_(grid.zero).lt(grid.lowest).any())

    def of(self, x: Tensor) -> Grid:
        """Compute the grid for x's own range along the last dimension; `scale` and `zero` are [..., 1]."""
        return self.grid(*_ends(x.float()))


class Rounding(Protocol):
    """Fixed levels: rounds each value to the nearest one, in the dtype that came in."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


class HasLevels(Protocol):
    """Anything that states its convention for levels, such as `Format`."""

    @property
    def levels(self) -> Levels:
        """Convention by which a range becomes levels."""


class Grid(NamedTuple):
    """Fixed uniform levels: value = (level - zero) * scale for the integer levels `lowest` to `highest`.

    Attributes:
        scale: float32, broadcastable against the tensor to quantize.
        zero: zero points, float32 tensor of integers, broadcastable in the same way.
        lowest: lowest level.
        highest: highest level.
    """

    scale: Tensor
    zero: Tensor
    lowest: int
    highest: int

    @classmethod
    def of(cls, x: Tensor, format: HasLevels) -> Grid:
        """Compute the grid of each row of x [..., G].

        Args:
            x: one row is one group, whatever the group size of `format`.
            format: supplies the convention for levels.
        """
        return format.levels.of(x)

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest level, less the zero point, in scales. Where their value would overflow, that is the end.

        Returns:
            Two tensors of the shape of `scale`.
        """
        most = LARGEST / self.scale
        return torch.maximum(self.lowest - self.zero, -most), torch.minimum(self.highest - self.zero, most)

    def __call__(self, x: Tensor) -> Tensor:
        """Quantize and dequantize x.

        The result holds the value of the nearest level, in x's dtype. Gradients pass through the rounding unchanged.
        """
        return _finite(self.numbers(x) * self.scale, x.dtype).to(x.dtype)

    def numbers(self, x: Tensor) -> Tensor:
        """The levels that values are rounded to, less the zero point: their values in units of the scale, float32."""
        scaled = x.float() / self.scale
        if scaled.requires_grad:
            return round_through(scaled).clamp(*self.ends)
        return scaled.round_().clamp_(*self.ends)  # memory that is new costs more than the arithmetic


class _RoundThrough(torch.autograd.Function):
    """Rounding whose backward pass returns the gradient unchanged."""

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
    """Round x, ties to even. The gradient passes through as if x had not been rounded (straight-through estimator)."""
    rounded: Tensor = _RoundThrough.apply(x) if x.requires_grad else x.round()
    return rounded


def straight_through(x: Tensor, new: Tensor) -> Tensor:
    """The values of `new`, with the gradient of x: what was done to x counts as nothing, clamping too."""
    return x + (new - x).detach()


def grouped(x: Tensor, group_size: int | None) -> list[Tensor]:
    """Cut the rows of x [..., D] into groups of consecutive channels.

    Args:
        x: has R rows in all.
        group_size: channels per group; None puts each row into one group.

    Returns:
        One tensor [R, G, group_size] and, if the group size does not divide D, a second one [R, 1, rest] with the
        shorter last group of each row. They are views of x if x is contiguous.
    """
    width = x.shape[-1]
    group = min(group_size or width, width)
    rows = x.reshape(-1, width)
    body = width - width % group
    views = [rows[:, :body].unflatten(-1, (-1, group))]
    return views if body == width else [*views, rows[:, body:].unsqueeze(1)]


def _whole(x: Tensor, levels: Levels, out: Tensor) -> None:
    """Quantize x [R, G, D] into `out` in one piece.

    torch.compile makes this one pass over x; a GPU runs it without waiting for the host.
    """
    out.copy_(levels.of(x)(x))


def _eager(x: Tensor, levels: Levels, out: Tensor) -> None:
    """Quantize x [R, G, D] into `out`, a few rows at a time.

    Every pass after the first then reads from the CPU's cache.
    """
    rows = max(1, BLOCK // max(1, x.shape[1] * x.shape[2]))
    own = x.dtype == torch.float32
    scratch = None if own else torch.empty(min(rows, len(x)), *x.shape[1:], dtype=torch.float32)
    for block, target in zip(x.split(rows), out.split(rows), strict=True):
        values = block if scratch is None else scratch[: len(block)].copy_(block)
        low, high = _ends(values)
        grid = levels.grid(low, high)
        work = torch.div(values, grid.scale, out=target if own else values).round_()
        # Ranges rarely reach past their levels, and testing their ends is cheaper than two passes over all values.
        if levels.reaches_past(low, high, grid):
            lowest, highest = grid.ends
            torch.maximum(torch.minimum(work, highest, out=work), lowest, out=work)
        work.mul_(grid.scale)
        if not own:
            target.copy_(_finite(work, x.dtype))


def _in_loops(x: Tensor, levels: Levels, out: Tensor) -> None:
    """Quantize x [R, G, D] into `out` by the compiled loops, a few rows at a time."""
    loops = affine_kernel.kernel()
    if loops is None or not loops.takes(x, out):
        _eager(x, levels, out)
        return
    rows = max(1, LOOPS_BLOCK // (x.shape[1] * x.shape[2]))
    for block, target in zip(x.split(rows), out.split(rows), strict=True):
        low, high = loops.ends(block)
        grid = levels.grid(low, high)
        loops.round(block, grid.scale, target, grid.ends if levels.reaches_past(low, high, grid) else None)


@functools.cache
def _compiled() -> Callable[[Tensor, Levels, Tensor], None] | None:
    """Compile `_whole`, once per process. Returns None, after one warning, if torch.compile fails here."""
    probe = torch.zeros(2, 2, 128, dtype=torch.float32)
    try:
        compiled: Callable[[Tensor, Levels, Tensor], None] = torch.compile(_whole)
        compiled(probe, Levels(4), torch.empty_like(probe))
    except Exception as error:
        message = f"{COMPILE}=1, but torch.compile fails here ({first_line(error)}): fake quantization runs eager"
        warnings.warn(message, stacklevel=3)
        return None
    return compiled


def _ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum along the last dimension, each [..., 1]."""
    # amin and amax are vectorised on a CPU; aminmax is not and takes ten times as long.
    return x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)


def _finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Clamp finite values of x to the range of `dtype` if that is float16.

    Otherwise the conversion would make large values infinite.
    """
    if dtype != torch.float16:
        return x
    largest = torch.finfo(dtype).max
    return torch.where(x.isinf(), x, x.clamp(-largest, largest))
