"""Quantize-dequantize arithmetic with floating-point levels: FP8, the MX formats and NVFP4.

Every rule for a scale is that of a named library, to the last bit: torchao 0.18, or compressed-tensors 0.20 for the
rule "compressed_tensors". Two things are meant to differ: zeros stay zeros where torchao divides zero by zero, and a
last group may be shorter than the others.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .affine import grouped

FormatName = Literal["int", "fp8", "mxfp8", "mxfp4", "nvfp4"]
ScaleRule = Literal["amax", "rceil", "floor", "even", "ceil", "tensor", "block", "compressed_tensors"]

CACHED = 2**17  # values quantized at a time on a CPU, so that they and what is made of them stay in its cache
EXPONENT = 0x7F800000  # bits of the exponent of a float32
MANTISSA = 23  # bits of its mantissa
BIAS = 127
MX: tuple[ScaleRule, ...] = ("rceil", "floor", "even", "ceil", "compressed_tensors")


class Element(NamedTuple):
    """A small floating-point type without infinities.

    Attributes:
        mantissa: bits of the mantissa.
        least: exponent of the smallest normal number; below it levels are evenly spaced.
        top: largest number.
    """

    mantissa: int
    least: int
    top: float

    def round_(self, x: Tensor, scratch: Tensor | None = None) -> Tensor:
        """Round float32 values to the nearest number of this type, in place. Ties go to the even mantissa.

        Larger values saturate, NaN stays NaN, and zeros keep their sign.

        Args:
            x: the values.
            scratch: two float32 tensors of x's shape to compute in, stacked; None allocates them.
        """
        first, second = (torch.empty_like(x), torch.empty_like(x)) if scratch is None else scratch
        x.clamp_(-self.top, self.top)
        # 1.5 * 2^k is so large that adding it leaves no bit of x below the last bit of the mantissa.
        bits = torch.bitwise_and(x.view(torch.int32), EXPONENT, out=first.view(torch.int32))
        bits.clamp_(min=(BIAS + self.least) << MANTISSA)
        bits.add_(((MANTISSA - self.mantissa) << MANTISSA) + (1 << (MANTISSA - 1)))
        torch.add(x, first, out=second).sub_(first)
        return torch.copysign(second, x, out=x)

    def round(self, x: Tensor) -> Tensor:
        """Round values to float32 numbers of this type. The gradient of values in range passes unchanged."""
        if x.requires_grad and torch.is_grad_enabled():
            rounded: Tensor = _RoundThrough.apply(x.float().clamp(-self.top, self.top), self)
            return rounded
        return self.round_(x.detach().to(torch.float32, copy=True))

    @property
    def exponent(self) -> int:
        """Exponent of the largest number."""
        return math.floor(math.log2(self.top))


class _RoundThrough(torch.autograd.Function):
    """Rounding whose backward pass returns the gradient unchanged."""

    @staticmethod
    def forward(x: Tensor, element: Element) -> Tensor:
        return element.round_(x.clone())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Element], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


E2M1 = Element(1, 0, 6.0)
E4M3 = Element(3, -6, 448.0)


class FloatType(NamedTuple):
    """What a floating-point format consists of.

    Attributes:
        element: type of the values.
        bits: bits per value, without its share of the scales.
        group_size: consecutive input channels that share a scale; None where the format leaves that open.
        rules: rules for its scale, the default first.
    """

    element: Element
    bits: int
    group_size: int | None
    rules: tuple[ScaleRule, ...]


FLOATS: dict[str, FloatType] = {
    "fp8": FloatType(E4M3, 8, None, ("amax", "compressed_tensors")),
    "mxfp8": FloatType(E4M3, 8, 32, MX),
    "mxfp4": FloatType(E2M1, 4, 32, MX),
    "nvfp4": FloatType(E2M1, 4, 16, ("tensor", "block", "compressed_tensors")),
}
"""Floating-point formats by name."""


class FloatGrid(NamedTuple):
    """Fixed floating-point levels: value = number of the element type * scale.

    Attributes:
        element: type of the values.
        scale: broadcastable against the tensor to quantize.
        by: what values are divided by before rounding, the scale up to rounding; or, if not `divides`, what they are
            multiplied with.
        divides: whether the published code divides.
        dtype: dtype in which the published code divides and multiplies.
        drops_sign: whether a negative zero becomes a positive one before rounding.
    """

    element: Element
    scale: Tensor
    by: Tensor
    divides: bool = True
    dtype: torch.dtype = torch.float32
    drops_sign: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Quantize and dequantize x. The result has x's dtype; gradients pass through the rounding unchanged."""
        return self.saturated(self.numbers(x).to(self.dtype) * self.scale, x.dtype).to(x.dtype)

    def overflows(self, dtype: torch.dtype) -> bool:
        """Whether the largest number of the element type times some scale, itself finite, exceeds a dtype's range."""
        beyond = self.scale.float() >= torch.finfo(dtype).max / self.element.top
        return bool((beyond & self.scale.isfinite()).any())

    def saturated(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Values as this grid dequantizes them; those beyond a dtype's range, with a finite scale, lie at its end."""
        if not self.overflows(dtype):
            return values
        largest = torch.finfo(dtype).max
        return torch.where(self.scale.isfinite(), values.clamp(-largest, largest), values)

    def numbers(self, x: Tensor) -> Tensor:
        """The numbers of the element type that values are rounded to, in units of the scale, float32."""
        work = x.to(self.dtype)
        # A factor may be infinite, and zero times infinity is NaN.
        scaled = work / self.by if self.divides else torch.where(work == 0, work, work * self.by)
        if self.drops_sign:
            scaled = scaled + 0
        return self.element.round(scaled)

    def write(self, x: Tensor, out: Tensor, scratch: Tensor) -> None:
        """Quantize and dequantize x into `out`, without gradients and without large temporary tensors.

        Args:
            x: the values, float32.
            out: receives the result; a tensor of x's shape and any floating dtype, which may be x itself.
            scratch: three float32 tensors of x's shape to compute in, stacked.
        """
        if self.dtype != torch.float32:
            out.copy_(self(x.to(self.dtype)))
            return
        work = out if out.dtype == torch.float32 else scratch[2]
        if self.divides:
            torch.div(x, self.by, out=work)
        elif x.is_cpu and not bool(self.by.isinf().any()):
            torch.mul(x, self.by, out=work)
        else:
            work.copy_(torch.where(x == 0, x, x * self.by))
        if self.drops_sign:
            work.add_(0)
        self.element.round_(work, scratch[:2]).mul_(self.scale)
        if work is not out or self.overflows(out.dtype):
            out.copy_(self.saturated(work, out.dtype))


@dataclass(frozen=True, eq=False)
class FloatLevels:
    """How a range of values becomes floating-point levels.

    Attributes:
        format: name of the format.
        rule: rule for its scale; see `Format`.
        whole: for "nvfp4", the largest magnitude of the tensor of which the ranges are parts, float32 and broadcastable
            against them; None takes that of the ranges at hand.
    """

    format: str
    rule: ScaleRule
    whole: Tensor | None = None

    @property
    def element(self) -> Element:
        """Type of the values."""
        return FLOATS[self.format].element

    @property
    def spans_tensor(self) -> bool:
        """Whether a scale depends on the largest magnitude of the whole tensor."""
        return self.format == "nvfp4" and self.rule != "block"

    def within(self, whole: Tensor) -> FloatLevels:
        """The levels of parts of a tensor with this largest magnitude."""
        return dataclasses.replace(self, whole=whole.float()) if self.spans_tensor else self

    def of(self, x: Tensor) -> FloatGrid:
        """Compute the levels for x's own range along the last dimension."""
        return self.reaching(_largest(x.detach().abs()), x.dtype)

    def grid(self, low: Tensor, high: Tensor, dtype: torch.dtype = torch.float32) -> FloatGrid:
        """Compute the levels for the ranges [low, high]. No gradient passes through the scale.

        Args:
            low: lowest value of each range.
            high: highest value of each range, of the same shape.
            dtype: dtype of the values, in which some published codes compute the scale.
        """
        return self.reaching(torch.maximum(-low.float(), high.float()), dtype)

    @torch.no_grad()
    def reaching(self, most: Tensor, dtype: torch.dtype = torch.float32) -> FloatGrid:
        """Compute the levels for values up to the magnitude `most`; see `grid`."""
        most = most.float()
        dtype = dtype if dtype == torch.bfloat16 else torch.float32  # the range of float16 is too small for scales
        if self.format == "fp8":
            return _fp8(most, self.rule, dtype)
        if self.format == "nvfp4":
            whole = self.whole if self.whole is not None else most.amax()
            return _nvfp4(most, whole, self.rule, dtype)
        return _mx(most, self.rule, self.element, dtype)


def fake_quantize_float(x: Tensor, levels: FloatLevels, group_size: int | None) -> Tensor:
    """Quantize x to floating-point levels along its last dimension, a few rows at a time, and convert them back.

    Args:
        x: [..., D], any floating dtype.
        levels: how a range becomes levels. If they have a `whole`, it is broadcastable against x.
        group_size: consecutive channels that share a scale; None puts the whole row into one group.

    Returns:
        A tensor of x's shape and dtype.
    """
    whole = levels.whole
    if whole is not None and whole.numel() > 1:
        whole = whole.expand(*x.shape[:-1], 1).reshape(-1, 1, 1)
    if x.requires_grad and torch.is_grad_enabled():
        mine = dataclasses.replace(levels, whole=whole)
        return torch.cat([mine.of(part)(part).flatten(1) for part in grouped(x, group_size)], dim=1).view_as(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for values, target in zip(grouped(x.detach(), group_size), grouped(out, group_size), strict=True):
        rows = min(len(values), max(1, CACHED // max(1, values[:1].numel())) if x.is_cpu else len(values))
        scratch = x.new_empty(3, rows, *values.shape[1:], dtype=torch.float32)
        for start in range(0, len(values), max(rows, 1)):
            part, into = values[start : start + rows], target[start : start + rows]
            spare = scratch[:, : len(part)]
            mine = levels if whole is None or whole.numel() == 1 else levels.within(whole[start : start + rows])
            own = part if part.dtype == torch.float32 else spare[2].copy_(part)
            grid = mine.reaching(_largest(torch.abs(own, out=spare[0])), x.dtype)
            grid.write(own, into, spare)
    return out


def _largest(size: Tensor) -> Tensor:
    """Largest of the magnitudes along the last dimension, [..., 1]. It overwrites what it is given."""
    while size.shape[-1] in (2, 4, 8, 16):  # torch reduces so few values one by one; halves are compared many at a time
        half, rest = size.chunk(2, dim=-1)
        size = torch.maximum(half, rest, out=half)
    return size if size.shape[-1] == 1 else size.amax(dim=-1, keepdim=True)


def _fp8(most: Tensor, rule: ScaleRule, dtype: torch.dtype) -> FloatGrid:
    """FP8: the scale is the largest magnitude / 448, computed in the dtype of the values.

    torchao then goes on in float32, compressed-tensors in that dtype.
    """
    scale = most.to(dtype) / E4M3.top
    if rule == "amax":
        scale = scale.float()
        scale = torch.where(scale == 0, 1, scale)
        return FloatGrid(E4M3, scale, scale)
    scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)
    return FloatGrid(E4M3, scale, scale, dtype=dtype, drops_sign=True)


def _mx(most: Tensor, rule: ScaleRule, element: Element, dtype: torch.dtype) -> FloatGrid:
    """MX: the scale is a power of two from 2^-127 to 2^127; see `Format` for the rules."""
    if rule == "rceil":
        exponent = (most / element.top).log2().ceil().clamp(-BIAS, BIAS).nan_to_num(BIAS + 1).int()
        # Values of the least scale are multiplied by 1: they are zeros, or too small to matter.
        factor = torch.where(exponent == -BIAS, 1, _power_of_two(-exponent))
        bad = most.isnan()
        return FloatGrid(
            element,
            _power_of_two(exponent).masked_fill(bad, torch.nan),
            factor.masked_fill(bad, torch.nan),
            divides=False,
        )
    bits = most.view(torch.int32)
    if rule in ("even", "compressed_tensors"):  # round to the mantissa first; the latter has that of FP4 also for FP8
        kept = element.mantissa if rule == "even" else E2M1.mantissa
        bits = (bits + (1 << (MANTISSA - kept - 1))) & EXPONENT
    exponent = (bits >> MANTISSA) - BIAS
    if rule == "ceil":
        exponent = exponent + ((bits & ((1 << MANTISSA) - 1)) > 0).int()
    overflows = (bits == EXPONENT) if rule == "compressed_tensors" else torch.zeros_like(bits, dtype=torch.bool)
    exponent = (exponent - element.exponent).clamp(min=-BIAS).masked_fill(overflows, BIAS + 1)
    scale = _power_of_two(exponent).masked_fill(most.isnan(), torch.nan)
    if rule == "compressed_tensors":
        scale = scale.to(dtype)
        return FloatGrid(element, scale, scale, dtype=dtype, drops_sign=True)
    return FloatGrid(element, scale, scale.clamp(min=torch.finfo(torch.float32).tiny))


def _nvfp4(most: Tensor, whole: Tensor, rule: ScaleRule, dtype: torch.dtype) -> FloatGrid:
    """NVFP4: the scale of a block is an E4M3 number times a float32 scale of the whole tensor."""
    if rule == "compressed_tensors":
        up = nvfp4_multiplier(whole, dtype)
        block = E4M3.round_(up * (most.to(dtype) / E2M1.top))
        block = torch.where(block == 0, torch.finfo(torch.float8_e4m3fn).eps, block)
        return FloatGrid(E2M1, block / up, block / up, drops_sign=True)
    least = 2.0**E4M3.least
    if rule == "block":
        block = E4M3.round_((most / E2M1.top).clamp(least, E4M3.top))
        return FloatGrid(E2M1, block, 1 / block, divides=False)
    down = whole / (E4M3.top * E2M1.top)
    down = torch.where(down == 0, 1, down)
    block = E4M3.round_((most / E2M1.top / down).clamp(least, E4M3.top))
    return FloatGrid(E2M1, down * block, (1 / down) / block, divides=False)


def nvfp4_multiplier(whole: Tensor, dtype: torch.dtype) -> Tensor:
    """What compressed-tensors multiplies the scales of NVFP4 blocks by before it rounds them to E4M3; float32.

    Args:
        whole: largest magnitude of the tensor.
        dtype: dtype of its values.
    """
    tiny, reach = torch.finfo(dtype).tiny, E4M3.top * E2M1.top
    return (reach / whole.to(dtype).clamp(min=tiny)).nan_to_num(1.0, 1.0, 1.0).float()


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float32 for integers from -127 to 128, which gives infinity."""
    normal = (exponent.clamp(min=-BIAS) + BIAS) << MANTISSA
    return torch.where(exponent <= -BIAS, 1 << (MANTISSA - 1), normal).view(torch.float32)
