"""The seam of post-training quantization: formats, what a method is given, what it answers."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from .affine import Divisor, Levels, ZeroPoint, fake_quantize
from .errors import Problem, UserError

Granularity = Literal["row", "channel", "tensor"]


class Format(BaseModel):
    """A numeric format. Weights are [out, in], activations [B, L, in] or [L, in].

    Attributes:
        bits: bits per value.
        group_size: input channels that share a scale; None is all of them. Only with rows.
        symmetric: levels around zero, without a zero point.
        granularity: what has a scale. "row": each output channel of a weight, each token of an activation (or each
            group of its channels). "channel": each input channel, over the tokens of one sample. "tensor": each
            weight, each sample of an activation.
        divisor, zero_point: the convention; see `Levels`. What the defaults are in published codes: docs/ptq.md.

    A range that spans tokens never spans samples, and padding does not enter it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bits: Annotated[int, Field(ge=2, le=8)]
    group_size: Annotated[int, Field(ge=1)] | None = None
    symmetric: bool = False
    granularity: Granularity = "row"
    divisor: Divisor = "qmax"
    zero_point: ZeroPoint = "in_range"

    @model_validator(mode="after")
    def _consistent(self) -> Format:
        if self.group_size is not None and self.granularity != "row":
            raise ValueError(f"`group_size` groups the channels of a row; leave it out with '{self.granularity}'")
        if self.divisor != "qmax" and not self.symmetric:
            raise ValueError("`divisor` is that of a symmetric scale; leave it out, or set `symmetric: true`")
        if self.zero_point != "in_range" and self.symmetric:
            raise ValueError("a symmetric format has no `zero_point`; leave it out, or set `symmetric: false`")
        return self

    @property
    def levels(self) -> Levels:
        return Levels(self.bits, self.symmetric, self.divisor, self.zero_point)

    def __call__(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Quantize and dequantize with x's own ranges, in float32, returned in x's dtype.

        Args:
            valid: [B, L] bool, tokens that are no padding; None where all are.
        """
        if self.granularity == "row":
            return fake_quantize(x, self.bits, self.group_size, self.symmetric, self.divisor, self.zero_point)
        return self.levels.grid(*self.range(x, valid))(x)

    def range(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(lowest, highest) value of whatever has a scale of its own, float32, to broadcast against x.

        A sample without a valid token has the range [0, 0]. Groups of a row are rows of their own here: give x as
        `grouped` cuts it.
        """
        over = {"row": [-1], "channel": [-2], "tensor": [-2, -1]}[self.granularity]
        values = x.float()
        if valid is None:
            return values.amin(dim=over, keepdim=True), values.amax(dim=over, keepdim=True)
        padding = ~valid.unsqueeze(-1)
        low = values.masked_fill(padding, float("inf")).amin(dim=over, keepdim=True)
        high = values.masked_fill(padding, float("-inf")).amax(dim=over, keepdim=True)
        empty = low > high
        return low.masked_fill(empty, 0), high.masked_fill(empty, 0)

    def __str__(self) -> str:
        grouping = f"g{self.group_size}" if self.group_size else self.granularity
        unusual = [word for word in (self.divisor, self.zero_point) if word not in ("qmax", "in_range")]
        return " ".join([f"{self.bits}-bit", "sym" if self.symmetric else "asym", grouping, *unusual])


@dataclass(frozen=True)
class Tokens:
    """What is known of the tokens of one call of the language model, for activations that ask.

    Attributes:
        vision: [B, L] bool, positions that hold an image's features.
        valid: [B, L] bool, positions that are no padding.
        prefill: the call starts a sequence; False while it is decoded, token by token.
    """

    vision: Tensor
    valid: Tensor
    prefill: bool = True


class TokenActivation(abc.ABC):
    """A fake quantization of a linear's input that looks at more than each token alone.

    Attributes:
        exact: bool, broadcastable to the latest input: elements that were passed on in full precision; None where
            there are none. The receipt looks at the others and says how many these are.
    """

    exact: Tensor | None = None

    @abc.abstractmethod
    def __call__(self, x: Tensor, tokens: Tokens | None = None) -> Tensor:
        """Quantize and dequantize x [B, L, in].

        Args:
            tokens: None where nothing is known of them (outside the language model): then all are valid text, and
                each call is a sequence of its own.
        """


class Transform:
    """An equivalent transformation around a linear: with it and without quantization its output is the same.

    Both sides answer in float32. `output`, where it is not None, is applied to what the linear answers.
    """

    output: Callable[[Tensor], Tensor] | None = None

    def input(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., in]."""
        return x.float()

    def weight(self, w: Tensor) -> Tensor:
        """[out, in] -> [out, in]."""
        return w.float()


@dataclass(frozen=True)
class Scaling(Transform):
    """Input channels divided by a scale that the weight's columns are multiplied by (SmoothQuant, AWQ).

    The published codes fold the division into the norm in front; here it stays at the input, in float32, so that
    the model is untouched and any linear can be transformed.
    """

    scale: Tensor

    def input(self, x: Tensor) -> Tensor:
        return x.float() / self.scale.to(x.device)

    def weight(self, w: Tensor) -> Tensor:
        return w.float() * self.scale.to(w.device)


@dataclass(frozen=True)
class LinearPlan:
    """What becomes of one linear.

    Attributes:
        weight: makes the fake-quantized weight [out, in] of the original, in its dtype; None leaves it. It is called
            linear by linear, so that never more than one original and its successor share a GPU.
        activation: fake-quantizes the linear's input [..., in]; None leaves it. A `TokenActivation` is told which
            tokens these are.
        transform: happens before both, in float32.
    """

    weight: Callable[[Tensor], Tensor] | None = None
    activation: Callable[[Tensor], Tensor] | TokenActivation | None = None
    transform: Transform | None = None

    def new_weight(self, weight: Tensor) -> Tensor:
        """The weight [out, in] that the matmul sees, in the original's dtype; the original where nothing is planned."""
        new = weight if self.transform is None else self.transform.weight(weight)
        return (new if self.weight is None else self.weight(new)).to(weight.dtype)

    def new_input(self, x: Tensor, tokens: Tokens | None = None) -> Tensor:
        """The input [..., in] that the matmul sees, in its dtype."""
        new = x if self.transform is None else self.transform.input(x)
        if isinstance(self.activation, TokenActivation):
            new = self.activation(new, tokens)
        elif isinstance(self.activation, Format):
            new = self.activation(new, None if tokens is None else tokens.valid)
        elif self.activation is not None:
            new = self.activation(new)
        return new.to(x.dtype)

    @property
    def asks(self) -> bool:
        """Whether the activation has to be told which tokens these are."""
        spans = isinstance(self.activation, Format) and self.activation.granularity != "row"
        return spans or isinstance(self.activation, TokenActivation)

    @property
    def changes_input(self) -> bool:
        return self.activation is not None or self.transform is not None


class PTQ(abc.ABC):
    """A post-training quantization method. Subclasses are frozen dataclasses; fields are the spec's parameters.

    Attributes:
        calibrates: whether it needs samples. Such methods derive from `CalibratedPTQ`.
        formats: (weights, activations) that a spec without either gets; None where a spec has to say.
        weight_granularities, activation_granularities: what `check` lets pass.
    """

    calibrates: ClassVar[bool] = False
    formats: ClassVar[tuple[Format | None, Format | None] | None] = None
    weight_granularities: ClassVar[tuple[Granularity, ...]] = ("row",)
    activation_granularities: ClassVar[tuple[Granularity, ...]] = ("row", "tensor")

    def check(self, weights: Format | None, activations: Format | None) -> None:
        """Raise UserError where the method cannot make these formats; the message names the field of `quantize`."""
        sides = {
            "weights": (weights, self.weight_granularities),
            "activations": (activations, self.activation_granularities),
        }
        for side, (asked, made) in sides.items():
            if asked is not None and asked.granularity not in made:
                message = f"this method makes {' or '.join(made)}, not '{asked.granularity}'"
                raise UserError(Problem(message, (side, "granularity")))

    @abc.abstractmethod
    def prepare(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
        calibration: Any = None,
    ) -> dict[str, LinearPlan]:
        """Plan every linear in scope.

        Args:
            model: the loaded model, read only.
            linears: the linears in scope, by their name in the model.
            weights, activations: the formats asked for; None leaves that side in the model's own precision.
            calibration: samples, for methods that need them: a `Calibration`, or a sequence of a model's inputs.

        Returns:
            One plan per linear. A linear that is left out is reported as a fallback in the receipt.
        """
