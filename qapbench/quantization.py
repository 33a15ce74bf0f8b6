"""The seam of post-training quantization: formats, what a method is given, what it answers."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from .affine import fake_quantize


class Format(BaseModel):
    """A numeric format, applied along the input channels of a linear.

    Weights: one scale per output channel, or per group of input channels. Activations: one scale per token, or
    per group of its channels; always dynamic, from that token alone.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    bits: Annotated[int, Field(ge=2, le=8)]
    group_size: Annotated[int, Field(ge=1)] | None = None
    symmetric: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.bits, self.group_size, self.symmetric)

    def __str__(self) -> str:
        grouping = f"g{self.group_size}" if self.group_size else "row"
        return f"{self.bits}-bit {'sym' if self.symmetric else 'asym'} {grouping}"


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
        elif self.activation is not None:
            new = self.activation(new)
        return new.to(x.dtype)

    @property
    def changes_input(self) -> bool:
        return self.activation is not None or self.transform is not None


class PTQ(abc.ABC):
    """A post-training quantization method. Subclasses are frozen dataclasses; fields are the spec's parameters.

    Attributes:
        calibrates: whether it needs samples. Such methods derive from `CalibratedPTQ`.
    """

    calibrates: ClassVar[bool] = False

    def check(self, weights: Format | None, activations: Format | None) -> None:
        """Raise UserError where the method cannot make these formats; the message names the field of `quantize`."""
        return

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
