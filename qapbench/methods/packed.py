"""Weights as they are stored: packed codes of few bits, scales and zero points, from which values are computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from .affine import Grid, Levels, grouped
from .floating import E2M1, FloatGrid, FloatLevels
from .normal_float import nf4_levels, normal_codes, normal_float

if TYPE_CHECKING:
    from .formats import Format

Numbers = Literal["int", "e2m1", "e4m3", "nf4"]
"""What codes stand for: integers, numbers of a small floating-point type, or quantiles of a normal distribution."""

TILE = 2**18  # weights that are unpacked at a time, so that they and what is made of them stay in a CPU's cache
HALVES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the numbers of E2M1 that are not negative, by their codes


class CannotPackError(ValueError):
    """A weight is not made of so many codes and scales."""


@runtime_checkable
class WeightRounding(Protocol):
    """What rounds a weight [out, in], and can say by which codes and scales."""

    def __call__(self, w: Tensor, /) -> Tensor: ...

    def packed(self, w: Tensor, /) -> PackedWeight: ...


def planes(bits: int) -> list[int]:
    """Widths of the planes that a code is cut into, from its lowest bit on: 3 bits are 2 and 1.

    Each width divides a byte, so no code lies across two bytes.
    """
    return [width for width in (8, 4, 2, 1) if bits & width]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes [R, W] below 2^bits into bytes: uint8 [R, n].

    A plane of p bits keeps 8 / p columns in a byte, the first ones in the lowest bits. They lie W p / 8 columns apart,
    so that columns which stand side by side are unpacked side by side.
    """
    parts, at = [], 0
    for width in planes(bits):
        count = 8 // width
        length = -(-codes.shape[1] // count)
        part = torch.zeros(len(codes), length, dtype=torch.uint8, device=codes.device)
        plane = codes if width == bits else (codes >> at) & (2**width - 1)
        for place, columns in enumerate(plane.split(length, dim=1) if length else ()):
            part[:, : columns.shape[1]] |= columns.to(torch.uint8) << (place * width)
        parts.append(part)
        at += width
    return torch.cat(parts, dim=1)


def unpack(packed: Tensor, bits: int, out: Tensor) -> Tensor:
    """Unpack codes that `pack` has packed.

    Args:
        packed: uint8 [R, n].
        bits: bits per code.
        out: uint8 [R, W], which is overwritten and returned.
    """
    start = at = 0
    for width in planes(bits):
        count = 8 // width
        length = -(-out.shape[1] // count)
        part = packed[:, start : start + length]
        for place, columns in enumerate(out.split(length, dim=1) if length else ()):
            held = part[:, : columns.shape[1]]
            if not at:
                torch.bitwise_right_shift(held, place * width, out=columns)
                if place + 1 < count:
                    columns.bitwise_and_(2**width - 1)
            else:
                columns.bitwise_or_(((held >> (place * width)) & (2**width - 1)) << at)
        start, at = start + length, at + width
    return out


def packed_bytes(format: Format, rows: int, width: int) -> int:
    """Bytes that a weight [rows, width] takes when it is packed as a format rounds it."""
    size = format.group_size or width
    down, across = {
        "row": (rows, -(-width // size)),
        "channel": (1, width),
        "tensor": (1, 1),
        "block": (-(-rows // size), -(-width // size)),
    }[format.granularity]
    zeros = 0 if format.format != "int" else 1 if format.symmetric else down * across
    return rows * sum(-(-width * plane // 8) for plane in planes(format.bits)) + 4 * down * across + zeros


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized weight [out, in] as codes, scales and zero points.

    A value is (number - zero point) * scale in float32. The number is the code itself for integers. A zero has no sign
    if codes are integers. As the `weight` of a `LinearPlan` it gives these values, whatever the original was.

    Attributes:
        codes: uint8 [out, n], packed as `pack` does.
        scale: float32 [ceil(out / rows), ceil(in / columns)].
        zero: zero points, uint8 or int32, of the shape of `scale` or [1, 1]; None if numbers are not integers.
        numbers: what codes stand for.
        bits: bits per code.
        width: number of inputs.
        rows: consecutive outputs that share a scale.
        columns: consecutive inputs that share a scale.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    numbers: Numbers
    bits: int
    width: int
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)."""
        return len(self.codes), self.width

    @property
    def nbytes(self) -> int:
        """Bytes that codes, scales and zero points take."""
        return sum(tensor.nbytes for tensor in (self.codes, self.scale, self.zero) if tensor is not None)

    def __call__(self, w: Tensor) -> Tensor:
        """The values [out, in], in the dtype and on the device of w."""
        return self.to(w.device).dequantized(w.dtype)

    def packed(self, w: Tensor) -> PackedWeight:
        """Itself, on the device of w."""
        return self.to(w.device)

    def first(self, count: int) -> PackedWeight:
        """Its first outputs, at most `count` of them."""
        scales = -(-count // self.rows)
        zero = None if self.zero is None else self.zero[:scales]
        return dataclasses.replace(self, codes=self.codes[:count], scale=self.scale[:scales], zero=zero)

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight with its tensors on a device."""
        zero = None if self.zero is None else self.zero.to(device)
        return dataclasses.replace(self, codes=self.codes.to(device), scale=self.scale.to(device), zero=zero)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The values [out, in]."""
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        self.write(out)
        return out

    def write(self, out: Tensor) -> None:
        """Write the values into `out` [out, in], a floating tensor, a few rows at a time."""
        step = self._step
        codes = torch.empty(min(step, len(out)), self.width, dtype=torch.uint8, device=out.device)
        own = out.dtype == torch.float32
        scratch = codes if own else torch.empty(codes.shape, dtype=torch.float32, device=out.device)
        for start in range(0, len(out), step):
            self._write_rows(start, out[start : start + step], codes, scratch)

    def equals(self, values: Tensor) -> bool:
        """Whether these are the values [out, in], to the bit. No second copy of them is made."""
        step = min(self._step, len(values))
        tile = torch.empty(step, self.width, dtype=values.dtype, device=values.device)
        codes, scratch = torch.empty_like(tile, dtype=torch.uint8), torch.empty_like(tile, dtype=torch.float32)
        for start in range(0, len(values), max(1, step)):
            part = values[start : start + step]
            self._write_rows(start, tile[: len(part)], codes, scratch)
            if not torch.equal(tile[: len(part)], part):
                return False
        return values.shape == self.shape

    @property
    def _step(self) -> int:
        """Number of rows that are unpacked at a time."""
        return max(1, TILE // max(1, self.width) if self.codes.is_cpu else len(self.codes))

    def _write_rows(self, start: int, target: Tensor, codes: Tensor, scratch: Tensor) -> None:
        """Write the values of some rows.

        Args:
            start: the first row.
            target: receives them.
            codes: uint8, what they are unpacked into; at least as many rows.
            scratch: float32, what they are computed in where `target` has another dtype.
        """
        work = target if target.dtype == torch.float32 else scratch[: len(target)]
        self._numbers(start, codes[: len(target)], work)
        self._per_scale(work, self._of_rows(self.scale, start, len(work)), torch.Tensor.mul_)
        if work is not target:
            target.copy_(work)

    def _numbers(self, start: int, codes: Tensor, out: Tensor) -> None:
        """Write the numbers, less the zero points, of some rows into `out`; `codes` is what they are unpacked into."""
        unpack(self.codes[start : start + len(out)], self.bits, codes)
        if self.numbers == "e4m3":
            out.copy_(codes.view(torch.float8_e4m3fn))
        elif self.zero is None:
            table = _table(self.numbers).to(out.device)
            out.copy_(table.index_select(0, codes.flatten().int()).view_as(out))
        else:
            out.copy_(codes)
            self._per_scale(out, self._of_rows(self.zero, start, len(out)).float(), torch.Tensor.sub_)

    def _of_rows(self, values: Tensor, start: int, count: int) -> Tensor:
        """Scales or zero points of some rows: [count or 1, ...]."""
        if len(values) == 1:
            return values
        if self.rows == 1:
            return values[start : start + count]
        return values[torch.arange(start, start + count, device=values.device) // self.rows]

    def _per_scale(self, work: Tensor, values: Tensor, change: Any) -> None:
        """Change `work` [R, in] in place by values [R or 1, groups] of which each counts for `columns` columns."""
        if values.shape[1] in (1, self.width):
            change(work, values)
            return
        body = self.width - self.width % self.columns
        change(work[:, :body].unflatten(1, (-1, self.columns)), values[:, : body // self.columns].unsqueeze(-1))
        if body < self.width:
            change(work[:, body:], values[:, -1:])

    # -- as tensors, in results of calibration --

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors by name, for the result of a calibration; `from_tensors` reads them."""
        layout = [get_args(Numbers).index(self.numbers), self.bits, self.width, self.rows, self.columns]
        found = {"codes": self.codes, "code_scale": self.scale, "layout": torch.tensor(layout)}
        return found if self.zero is None else {**found, "zero": self.zero}

    @classmethod
    def from_tensors(cls, found: Mapping[str, Tensor]) -> PackedWeight:
        """The weight whose `tensors` these are; others among them are ignored."""
        numbers, *rest = found["layout"].tolist()
        return cls(found["codes"], found["code_scale"], found.get("zero"), get_args(Numbers)[numbers], *rest)


def _table(numbers: Numbers) -> Tensor:
    """Number that each code stands for."""
    return nf4_levels() if numbers == "nf4" else torch.tensor(HALVES + tuple(-half for half in HALVES)).float()


def _encoded(numbers: Tensor, kind: Numbers) -> Tensor:
    """Codes of floating-point numbers [R, W]: uint8."""
    if kind == "e4m3":
        return numbers.to(torch.float8_e4m3fn).view(torch.uint8)
    code = torch.bucketize(numbers.abs(), _table("e2m1")[: len(HALVES)].to(numbers.device))
    return code.to(torch.uint8) + 8 * numbers.signbit().to(torch.uint8)


class _Piece(NamedTuple):
    """Some rows of a weight: packed codes, and scales and zero points [rows or 1, groups]."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def packed_on(values: Tensor, grids: Sequence[Grid | FloatGrid], format: Format) -> PackedWeight:
    """Pack a weight that is rounded already, to levels that are known.

    Args:
        values: float32 [out, in], as the grids have rounded them.
        grids: the levels of each group of columns, with scales [out, 1]; or those of each tensor that `grouped` cuts
            the weight into, with scales [out, groups, 1].
        format: format of the weight, of granularity "row".

    Raises:
        CannotPackError: a value is none of the levels.
    """
    size = format.group_size or values.shape[1]
    parts = grouped(values, size) if grids[0].scale.ndim == 3 else values.split(size, dim=1)
    packed = _joined([_piece(parts, grids, format.bits)], grids[0], format.bits, values.shape, size)
    if not torch.equal(packed.dequantized(torch.float32), values):
        raise CannotPackError("its values are not products of a level and a scale")
    return packed


def packed_tensors(values: Tensor, grids: Sequence[Grid | FloatGrid], format: Format) -> dict[str, Tensor]:
    """A weight that is rounded already as tensors for the result of a calibration, from which `kept_rounding` makes it.

    They are its codes and scales, which take a fraction of the values' memory. Values that cannot be packed, because
    a range overflows, are kept themselves. The arguments are those of `packed_on`.
    """
    try:
        return packed_on(values, grids, format).tensors()
    except CannotPackError:
        return {"weight": values}


def kept_rounding(found: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The `weight` of a plan whose weight was kept by `packed_tensors`."""
    return PackedWeight.from_tensors(found) if "codes" in found else found["weight"].to


@dataclass(frozen=True)
class NormalFloat:
    """Rounding of weights to NF4, see `normal_float`.

    Attributes:
        block: inputs per block.
        double: whether the blocks' scales are quantized too.
    """

    block: int = 64
    double: bool = True

    def __call__(self, w: Tensor) -> Tensor:
        return normal_float(w, self.block, self.double)

    def packed(self, w: Tensor) -> PackedWeight:
        """The codes and scales of a weight [out, in]."""
        found = list(normal_codes(w, self.block, self.double))
        codes = torch.cat([codes.to(torch.uint8).flatten(1) for codes, _ in found], dim=1)
        scale = torch.cat([scale for _, scale in found], dim=1)
        return PackedWeight(pack(codes, 4), scale, None, "nf4", 4, w.shape[1], 1, min(self.block, w.shape[1]))


def packed_by(w: Tensor, format: Format) -> PackedWeight:
    """Pack a weight [out, in] as a format rounds it.

    Raises:
        CannotPackError: a value is not finite, or a range overflows.
    """
    levels, bits, width = format.levels_within(w), format.bits, w.shape[1]
    if format.granularity == "row":
        pieces = []
        for some in w.split(max(1, TILE // max(1, width))):
            parts = grouped(some, format.group_size)
            grids = [levels.of(part) for part in parts]
            pieces.append(_piece(parts, grids, bits))
        return _joined(pieces, grids[0], bits, w.shape, min(format.group_size or width, width))
    if format.granularity == "block":
        side, pieces = format.group_size or 128, []
        for band in w.split(side):
            squares = band.split(side, dim=1)
            grids = [_grid(levels, square.amin().view(1, 1), square.amax().view(1, 1), w.dtype) for square in squares]
            pieces.append(_piece(squares, grids, bits))
        return _joined(pieces, grids[0], bits, w.shape, side, side)
    grid = _grid(levels, *format.range(w), w.dtype)
    return _joined([_piece([w], [grid], bits)], grid, bits, w.shape, max(1, width // grid.scale.shape[1]), len(w))


def _grid(levels: Levels | FloatLevels, low: Tensor, high: Tensor, dtype: torch.dtype) -> Grid | FloatGrid:
    low, high = low.float(), high.float()
    return levels.grid(low, high, dtype) if isinstance(levels, FloatLevels) else levels.grid(low, high)


def _piece(parts: Sequence[Tensor], grids: Sequence[Grid | FloatGrid], bits: int) -> _Piece:
    """Round the parts [R, ..., columns] of some rows to their levels, and pack the codes."""
    codes, scales, zeros = [], [], []
    for part, grid in zip(parts, grids, strict=True):
        numbers = grid.numbers(part)
        scales.append(grid.scale.float().flatten(1))
        if isinstance(grid, Grid):
            offset = _offset(grid, bits)
            exact = numbers.add_(offset) if not numbers.requires_grad else numbers + offset
            code = exact.detach().to(torch.uint8)
            if bool((exact.detach() != code).any()) or (code.numel() and int(code.max()) >= 2**bits):
                raise CannotPackError(f"its values are not on {2**bits} levels")
            codes.append(code.flatten(1))
            zeros.append(offset.flatten(1))
        else:
            if grid.overflows(part.dtype):
                raise CannotPackError("its largest values are beyond the range of its dtype")
            codes.append(_encoded(numbers, _kind(grid)).flatten(1))
    zero = torch.cat(zeros, dim=1) if zeros else None
    return _Piece(pack(torch.cat(codes, dim=1), bits), torch.cat(scales, dim=1), zero)


def _offset(grid: Grid, bits: int) -> Tensor:
    """What a level is more than its code: the zero point, or half of all codes where levels are symmetric."""
    return torch.full_like(grid.zero, 2 ** (bits - 1)) if grid.lowest < 0 else grid.zero


def _kind(grid: Grid | FloatGrid) -> Numbers:
    if isinstance(grid, Grid):
        return "int"
    return "e2m1" if grid.element == E2M1 else "e4m3"


def _joined(
    pieces: Sequence[_Piece],
    grid: Grid | FloatGrid,
    bits: int,
    shape: Sequence[int],
    columns: int,
    rows: int = 1,
) -> PackedWeight:
    """The weight of which these are the rows; `grid` is one of its levels."""
    zero = None
    zeros = [piece.zero for piece in pieces if piece.zero is not None]
    if isinstance(grid, Grid) and grid.lowest < 0:
        zero = zeros[0][:1, :1].to(torch.uint8)
    elif zeros:
        zero = torch.cat(zeros)
        zero = zero.to(torch.uint8 if bool(((zero >= 0) & (zero <= 255)).all()) else torch.int32)
    codes, scale = torch.cat([piece.codes for piece in pieces]), torch.cat([piece.scale for piece in pieces])
    return PackedWeight(codes, scale, zero, _kind(grid), bits, shape[1], rows, columns)
