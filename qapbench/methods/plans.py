"""How one linear layer is quantized: what is done to its weight and its input, and around both."""

from __future__ import annotations

import abc
import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .formats import Format
from .packed import PackedWeight, WeightRounding


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

    def to(self, device: torch.device) -> Tokens:
        """The same on a device; the same object if it is there."""
        if self.vision.device == device:
            return self
        return Tokens(self.vision.to(device), self.valid.to(device), self.prefill)


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
        tokens = tokens.to(x.device) if tokens is not None and self.needs_tokens else tokens
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
