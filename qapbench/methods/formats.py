"""Number formats of weights and activations, and which linears have which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from .affine import Divisor, Levels, ZeroPoint, fake_quantize
from .floating import FLOATS, FloatLevels, FormatName, ScaleRule, fake_quantize_float
from .packed import PackedWeight, packed_by

Granularity = Literal["row", "channel", "tensor", "block"]
"""Which values share a scale; see `Format`."""


class Format(BaseModel):
    """A number format, for weights [out, in] or activations [B, L, in] or [L, in].

    A range that covers several tokens never covers several samples, and padding does not enter it.

    Attributes:
        format: "int" has uniform levels. The others have floating-point levels, a fixed number of bits and a scale
            without a zero point: "fp8" is E4M3 (granularities "row", with or without groups, "tensor" and "block"),
            "mxfp8" and "mxfp4" have one power of two per 32 input channels as their scale, and "nvfp4" has one E4M3
            scale per 16 input channels, times a float32 scale of the whole weight or of the sample's activation.
        bits: bits per value.
        group_size: consecutive input channels that share a scale; None means all of them. Only for granularity "row",
            and for "block" the side of the square, 128 unless it is given.
        symmetric: whether levels are symmetric around zero, without a zero point.
        granularity: what has a scale of its own. "row": each output channel of a weight and each token of an
            activation, or each group of its input channels. "channel": each input channel, over the output channels of
            a weight or the tokens of one sample. "tensor": each weight, and each sample of an activation. "block": each
            square of a weight.
        divisor: convention for symmetric scales, see `Levels`. docs/ptq.md lists which published code uses which one.
        zero_point: convention for asymmetric ranges, see `Levels`.
        scale: rule for the scale of a floating-point format; None for "int". The first of each is the default.
            MX formats: "rceil" is the least power of two with which nothing saturates (Blackwell, and the inference
            configuration of torchao), "floor" cuts the largest magnitude's mantissa off and saturates (OCP), "even"
            rounds it to the element's mantissa first, "ceil" takes the next power of two. "nvfp4": "tensor" has the
            scale of the tensor, "block" has none. "fp8": "amax" is the largest magnitude / 448. These are torchao's;
            "compressed_tensors" is that library's rule for each of the formats.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: FormatName = "int"
    bits: Annotated[int, Field(ge=2, le=8)]
    group_size: Annotated[int, Field(ge=1)] | None = None
    symmetric: bool = False
    granularity: Granularity = "row"
    divisor: Divisor = "qmax"
    zero_point: ZeroPoint = "in_range"
    scale: ScaleRule | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_format(cls, data: Any) -> Any:
        """Fill in what follows from a floating-point format."""
        kind = FLOATS.get(str(data.get("format"))) if isinstance(data, dict) else None
        if kind is None:  # of an unknown format only the name is wrong
            return {"bits": 8, **data} if isinstance(data, dict) and data.get("format", "int") != "int" else data
        size = 128 if data.get("granularity") == "block" else kind.group_size
        filled = {"bits": kind.bits, "group_size": size, "symmetric": True, "scale": kind.rules[0]}
        return filled | {name: value for name, value in data.items() if value is not None}

    @model_validator(mode="after")
    def _consistent(self) -> Format:
        if self.format != "int":
            self._check_float()
        elif self.scale is not None:
            raise ValueError("`scale` is the rule of a floating-point format; leave it out, or name a `format`")
        elif self.granularity == "block":
            raise ValueError("`granularity: block` is that of `format: fp8`; take 'row', 'channel' or 'tensor'")
        if self.group_size is not None and self.granularity not in ("row", "block"):
            raise ValueError(f"`group_size` groups the channels of a row; leave it out with '{self.granularity}'")
        if self.divisor != "qmax" and not self.symmetric:
            raise ValueError("`divisor` is that of a symmetric scale; leave it out, or set `symmetric: true`")
        if self.zero_point != "in_range" and self.symmetric:
            raise ValueError("a symmetric format has no `zero_point`; leave it out, or set `symmetric: false`")
        return self

    def _check_float(self) -> None:
        """Check that the fields are those that the floating-point format has."""
        kind = FLOATS[self.format]
        fixed = {"bits": kind.bits, "symmetric": True, "divisor": "qmax"}
        if kind.group_size is not None:
            fixed |= {"group_size": kind.group_size, "granularity": "row"}
        for name, value in fixed.items():
            if getattr(self, name) != value:
                raise ValueError(f"`{name}` of {self.format} is {value}; leave it out")
        if self.scale not in kind.rules:
            raise ValueError(f"`scale` of {self.format} is one of {', '.join(kind.rules)}")

    @model_serializer(mode="wrap")
    def _without_new_fields(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain data. Integer formats have the fields that they always had, so that their runs keep their ids."""
        data: dict[str, Any] = dump(self)
        if self.format == "int":
            del data["format"], data["scale"]
        return data

    @property
    def levels(self) -> Levels | FloatLevels:
        """Convention by which a range becomes levels."""
        if self.format != "int":
            return FloatLevels(self.format, self.scale or FLOATS[self.format].rules[0])
        return Levels(self.bits, self.symmetric, self.divisor, self.zero_point)

    @property
    def spans_tokens(self) -> bool:
        """Whether a token's scale depends on other tokens of its sample."""
        levels = self.levels
        return self.granularity != "row" or (isinstance(levels, FloatLevels) and levels.spans_tensor)

    def levels_within(self, x: Tensor, valid: Tensor | None = None) -> Levels | FloatLevels:
        """Convention by which the range of a part of x becomes levels.

        It differs from `levels` for a format whose scales depend on the whole tensor.

        Args:
            x: a weight or an activation.
            valid: [B, L] bool, True for tokens that are not padding; None if there is no padding.
        """
        levels = self.levels
        if isinstance(levels, FloatLevels) and levels.spans_tensor:
            low, high = _range(x, [-2, -1] if x.ndim > 1 else [-1], valid)
            return levels.within(torch.maximum(low.abs(), high.abs()))
        return levels

    def __call__(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Quantize and dequantize x with ranges taken from x itself.

        The arithmetic is float32; the result has x's shape and dtype.

        Args:
            x: a weight or an activation.
            valid: [B, L] bool, True for tokens that are not padding; None if there is no padding. Formats whose scales
                do not span tokens ignore it.
        """
        levels = self.levels_within(x, valid)
        if isinstance(levels, FloatLevels):
            if self.granularity == "row":
                return fake_quantize_float(x, levels, self.group_size)
            if self.granularity == "block":
                return _by_square(x, levels, self.group_size or 128)
            return levels.grid(*self.range(x, valid), x.dtype)(x)
        if self.granularity == "row":
            return fake_quantize(x, self.bits, self.group_size, self.symmetric, self.divisor, self.zero_point)
        return levels.grid(*self.range(x, valid))(x)

    def packed(self, w: Tensor) -> PackedWeight:
        """The codes and scales of a weight [out, in], whose values are those that a call returns.

        Raises:
            CannotPackError: a value is not finite, or a range overflows.
        """
        return packed_by(w, self)

    def range(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of each set of values that shares a scale.

        Groups within a row are not cut here: pass x as `grouped` cuts it, so that each group is a row. A sample without
        a valid token has the range [0, 0].

        Args:
            x: a weight or an activation.
            valid: [B, L] bool, True for tokens that are not padding; None if there is no padding.

        Returns:
            (lowest, highest), float32 and broadcastable against x.
        """
        return _range(x, {"row": [-1], "channel": [-2]}.get(self.granularity, [-2, -1]), valid)

    def __str__(self) -> str:
        """A short description, for example "4-bit asym g128"."""
        if self.format != "int":
            kind = FLOATS[self.format]
            place = "" if kind.group_size else f" {self._grouping}"
            return f"{self.format}{place}" + ("" if self.scale == kind.rules[0] else f" {self.scale}")
        unusual = [word for word in (self.divisor, self.zero_point) if word not in ("qmax", "in_range")]
        return " ".join([f"{self.bits}-bit", "sym" if self.symmetric else "asym", self._grouping, *unusual])

    @property
    def _grouping(self) -> str:
        """What shares a scale, in a word."""
        return f"g{self.group_size}" if self.group_size and self.granularity == "row" else self.granularity


class LinearFormats(NamedTuple):
    """The formats of one linear.

    Attributes:
        weights: format of its weight; None leaves it as it is.
        activations: format of its input; None leaves it as it is.
    """

    weights: Format | None
    activations: Format | None

    @property
    def bits(self) -> tuple[int, int]:
        """Bits of both; 16 stand for no quantization."""
        weights, activations = (16 if one is None else one.bits for one in self)
        return weights, activations


def _range(x: Tensor, over: list[int], valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lowest and highest value over some dimensions, which are kept; see `Format.range`."""
    values = x.float()
    if valid is None:
        return values.amin(dim=over, keepdim=True), values.amax(dim=over, keepdim=True)
    padding = ~valid.unsqueeze(-1)
    low = values.masked_fill(padding, float("inf")).amin(dim=over, keepdim=True)
    high = values.masked_fill(padding, float("-inf")).amax(dim=over, keepdim=True)
    empty = low > high
    return low.masked_fill(empty, 0), high.masked_fill(empty, 0)


def _by_square(x: Tensor, levels: FloatLevels, side: int) -> Tensor:
    """Quantize and dequantize x [..., R, D] with one scale per square; the last ones may be smaller."""
    rows = []
    for band in x.split(side, dim=-2):
        squares = [levels.grid(*_range(part, [-2, -1], None), x.dtype)(part) for part in band.split(side, dim=-1)]
        rows.append(torch.cat(squares, dim=-1))
    return torch.cat(rows, dim=-2)


def by_formats(linears: Iterable[str], formats: Mapping[str, LinearFormats]) -> dict[LinearFormats, list[str]]:
    """Names of linears by their formats, in the order of the linears."""
    found: dict[LinearFormats, list[str]] = {}
    for name in linears:
        found.setdefault(formats[name], []).append(name)
    return found
