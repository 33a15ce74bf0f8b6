"""Interface of post-training quantization methods: number formats, plans for linear layers, the base class `PTQ`."""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor, nn

from qapbench.errors import Problem, UserError

from .affine import Divisor, Levels, ZeroPoint, fake_quantize
from .floating import FLOATS, FloatLevels, FormatName, ScaleRule, fake_quantize_float
from .packed import PackedWeight, WeightRounding, packed_by

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


@dataclass(frozen=True)
class Tokens:
    """What is known of the tokens in one call of the language model, for activations that depend on it.

    Attributes:
        vision: [B, L] bool, True at positions that hold an image's features.
        valid: [B, L] bool, True at positions that are not padding.
        prefill: True if the call starts a sequence, False if it continues one while tokens are generated.
    """

    vision: Tensor
    valid: Tensor
    prefill: bool = True


class TokenActivation(abc.ABC):
    """Fake quantization of a linear's input that needs more than each token by itself.

    Attributes:
        exact: bool, broadcastable to the latest input: True for elements that were passed on in full precision; None if
            there are none. The receipt measures the bits of the other elements and states the fraction of these. It is
            set to None once it has been read.
    """

    exact: Tensor | None = None

    @abc.abstractmethod
    def __call__(self, x: Tensor, tokens: Tokens | None = None) -> Tensor:
        """Quantize and dequantize x [B, L, in].

        Args:
            x: the linear's input.
            tokens: what is known of the tokens of x. None means that nothing is known, as outside the language model:
                then all tokens count as valid text and each call as a new sequence.
        """


class Transform:
    """Equivalent transformation around a linear layer: without quantization, the layer's output stays the same.

    `input` and `weight` return float32.

    Attributes:
        output: applied to the linear's output if it is not None.
    """

    output: Callable[[Tensor], Tensor] | None = None

    def input(self, x: Tensor) -> Tensor:
        """Transform the linear's input: [..., in] -> [..., in] in float32."""
        return x.float()

    def weight(self, w: Tensor) -> Tensor:
        """Transform the weight: [out, in] -> [out, in] in float32."""
        return w.float()


@dataclass(frozen=True)
class Scaling(Transform):
    """Division of input channels by a scale, undone by multiplying the weight's columns (SmoothQuant, AWQ).

    The published codes fold the division into the preceding norm. Here it is applied to the input in float32, so that
    the model stays unchanged and every linear can be transformed.

    Attributes:
        scale: [in], positive.
    """

    scale: Tensor

    def input(self, x: Tensor) -> Tensor:
        """Divide each input channel by its scale: [..., in] -> [..., in] in float32."""
        return x.float() / self.scale.to(x.device)

    def weight(self, w: Tensor) -> Tensor:
        """Multiply each column by its scale: [out, in] -> [out, in] in float32."""
        return w.float() * self.scale.to(w.device)


@dataclass(frozen=True)
class LinearPlan:
    """How one linear layer is quantized.

    Attributes:
        weight: returns the fake-quantized weight [out, in] for the original (or transformed) one; None leaves the
            weight as it is. It is called for one linear at a time, so that a GPU never holds both versions of more than
            one weight. If it is a `WeightRounding`, the weight can be stored packed.
        activation: fake-quantizes the linear's input [..., in]; None leaves it as it is. A `TokenActivation` is also
            given what is known of the tokens.
        transform: transformation applied before both, in float32; None for none.
    """

    weight: Callable[[Tensor], Tensor] | None = None
    activation: Callable[[Tensor], Tensor] | TokenActivation | None = None
    transform: Transform | None = None

    def new_weight(self, weight: Tensor) -> Tensor:
        """The weight [out, in] used in the matmul, in the dtype of `weight`.

        It is `weight` itself if nothing is planned for it.
        """
        new = weight if self.transform is None else self.transform.weight(weight)
        return (new if self.weight is None else self.weight(new)).to(weight.dtype)

    def packed(self, weight: Tensor) -> PackedWeight | None:
        """The codes and scales of `new_weight`; None if the method rounds weights in a way that does not tell them.

        Raises:
            CannotPackError: they are not made of codes and scales.
        """
        if not isinstance(self.weight, WeightRounding):
            return None
        return self.weight.packed(weight if self.transform is None else self.transform.weight(weight))

    def new_input(self, x: Tensor, tokens: Tokens | None = None) -> Tensor:
        """The input [..., in] used in the matmul, in the dtype of x.

        Args:
            x: the linear's input.
            tokens: what is known of the tokens of x; needed if `needs_tokens`.
        """
        new = x if self.transform is None else self.transform.input(x)
        if isinstance(self.activation, TokenActivation):
            new = self.activation(new, tokens)
        elif isinstance(self.activation, Format):
            new = self.activation(new, None if tokens is None else tokens.valid)
        elif self.activation is not None:
            new = self.activation(new)
        return new.to(x.dtype)

    def to(self, device: torch.device) -> LinearPlan:
        """The same plan with the tensors that every forward pass reads on `device`: those of activation and transform.

        What `weight` reads stays where it is, because it is called once. Without a tensor elsewhere, the parts of the
        plan are the same objects.
        """
        placed = {name: _placed(getattr(self, name), device) for name in ("activation", "transform")}
        return dataclasses.replace(self, **placed)

    @property
    def needs_tokens(self) -> bool:
        """Whether the activation depends on what is known of the tokens: on padding, modality or prefill."""
        spans = isinstance(self.activation, Format) and self.activation.spans_tokens
        return spans or isinstance(self.activation, TokenActivation)

    @property
    def changes_input(self) -> bool:
        """Whether the matmul gets another input than the linear was given."""
        return self.activation is not None or self.transform is not None


def _placed(value: Any, device: torch.device) -> Any:
    """A copy of a value with all tensors inside it on `device`; the value itself if none is elsewhere."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        items = [_placed(item, device) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, type) or not (
        isinstance(value, Transform | TokenActivation) or dataclasses.is_dataclass(value)
    ):
        return value
    held = vars(value)
    moved = {name: _placed(inner, device) for name, inner in held.items()}
    if all(moved[name] is held[name] for name in held):
        return value
    copied = copy.copy(value)
    vars(copied).update(moved)
    return copied


class PTQ(abc.ABC):
    """A post-training quantization method.

    Subclasses are frozen dataclasses whose fields are the parameters that a spec can set.

    Attributes:
        calibrates: whether the method needs calibration samples. Such methods derive from `CalibratedPTQ`.
        formats: (weights, activations) used if a spec states neither; None if a spec must state them.
        weight_formats: names of formats of weights that `check` accepts.
        weight_granularities: granularities of weights that `check` accepts.
        activation_granularities: granularities of activations that `check` accepts.
    """

    calibrates: ClassVar[bool] = False
    formats: ClassVar[tuple[Format | None, Format | None] | None] = None
    weight_formats: ClassVar[tuple[FormatName, ...]] = get_args(FormatName)
    weight_granularities: ClassVar[tuple[Granularity, ...]] = ("row",)
    activation_granularities: ClassVar[tuple[Granularity, ...]] = ("row", "tensor")

    @property
    def used_metrics(self) -> tuple[str, ...]:
        """Names of registered metrics that the method computes. Their code counts for the identity of its results."""
        return ()

    def online_flops(self, name: str, inward: int, outward: int, of_norm: bool) -> int:
        """FLOPs per token of the transforms that a linear needs while the model runs; its cost counts them.

        A transform that can be folded into the weights in front of the linear is none of them.

        Args:
            name: name of the linear.
            inward: width of the linear's input.
            outward: width of its output.
            of_norm: whether it reads what a norm gives, and so the residual stream.
        """
        return 0

    def check(self, weights: Format | None, activations: Format | None) -> None:
        """Check that the method supports these formats.

        Raises:
            UserError: it does not. The message names the field of the spec's `quantize` section.
        """
        sides = {
            "weights": (weights, self.weight_granularities),
            "activations": (activations, self.activation_granularities),
        }
        for side, (format, supported) in sides.items():
            if format is not None and format.granularity not in supported:
                message = f"this method makes {' or '.join(supported)}, not '{format.granularity}'"
                raise UserError(Problem(message, (side, "granularity")))
        if weights is not None and weights.format not in self.weight_formats:
            message = f"this method makes {' or '.join(self.weight_formats)}, not '{weights.format}'"
            raise UserError(Problem(message, ("weights", "format")))

    @abc.abstractmethod
    def prepare(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
        calibration: Any = None,
    ) -> dict[str, LinearPlan]:
        """Make a plan for every linear in scope.

        Args:
            model: the loaded model, which must not be changed.
            linears: the linears in scope, by their name in the model.
            weights: the format asked for; None leaves weights in the model's precision.
            activations: the format asked for; None leaves activations in the model's precision.
            calibration: samples, for methods that need them: a `Calibration`, `CalibrationSamples`, or a sequence of
                the model's inputs.

        Returns:
            One plan per linear. The receipt reports a linear without a plan as a fallback.
        """

    def prepare_each(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        formats: Mapping[str, LinearFormats],
        calibration: Any = None,
    ) -> dict[str, LinearPlan]:
        """Make a plan for every linear in scope, in formats of its own.

        Args:
            model: the loaded model, which must not be changed.
            linears: the linears in scope, by their name in the model.
            formats: the formats of each of them. If they differ, a linear without any is none that the method sees.
            calibration: as in `prepare`.

        Returns:
            One plan per linear, as `prepare`; none for a linear that the method does not see.
        """
        pairs = set(formats.values())
        if len(pairs) < 2:
            weights, activations = next(iter(pairs), LinearFormats(None, None))
            return self.prepare(model, linears, weights, activations, calibration)
        asked = {name: linear for name, linear in linears.items() if any(formats[name])}
        return self._prepare_several(model, asked, formats, calibration)

    def _prepare_several(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        formats: Mapping[str, LinearFormats],
        calibration: Any,
    ) -> dict[str, LinearPlan]:
        """The plans of linears in formats that may differ: those of each pair of formats by themselves."""
        found: dict[str, LinearPlan] = {}
        for pair, names in by_formats(linears, formats).items():
            found |= self.prepare(model, {name: linears[name] for name in names}, *pair, calibration)
        return {name: found[name] for name in linears if name in found}


def by_formats(linears: Iterable[str], formats: Mapping[str, LinearFormats]) -> dict[LinearFormats, list[str]]:
    """Names of linears by their formats, in the order of the linears."""
    found: dict[LinearFormats, list[str]] = {}
    for name in linears:
        found.setdefault(formats[name], []).append(name)
    return found
