"""The seam of post-training quantization: formats, what a method is given, what it answers."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

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
class LinearPlan:
    """What becomes of one linear.

    Attributes:
        weight: makes the fake-quantized weight [out, in] of the original, in its dtype; None leaves it. It is called
            linear by linear, so that never more than one original and its successor share a GPU.
        activation: fake-quantizes the linear's input [..., in]; None leaves it.
    """

    weight: Callable[[Tensor], Tensor] | None = None
    activation: Callable[[Tensor], Tensor] | None = None


class PTQ(abc.ABC):
    """A post-training quantization method. Subclasses are frozen dataclasses; fields are the spec's parameters."""

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
            calibration: samples, for methods that need them.

        Returns:
            One plan per linear. A linear that is left out is reported as a fallback in the receipt.
        """
