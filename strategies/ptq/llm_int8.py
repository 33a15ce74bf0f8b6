"""LLM.int8(): 8-bit integers everywhere, except in the input channels that hold outliers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from qapbench import (
    PTQ,
    Format,
    Grid,
    LinearPlan,
    PackedWeight,
    TokenActivation,
    Tokens,
    UserError,
    packed_on,
    ptq,
)

TOP = 127
INT8 = Format(bits=8, symmetric=True)


@ptq("llm_int8")
@dataclass(frozen=True)
class LLMInt8(PTQ):
    """Quantize weights and activations to int8, but keep input channels with outliers in full precision.

    Each weight row and each token has a symmetric scale from its largest magnitude. As in bitsandbytes, both sides are
    rounded to float16 first, only the outlying elements themselves are left out of a token's largest magnitude, and
    outlier channels are multiplied by the dequantized int8 weight.

    One thing differs from bitsandbytes, where the outlier channels are those of the whole batch. Here each sample has
    its own, and padding does not count, so that no answer depends on the other samples of its batch.

    Attributes:
        threshold: magnitude from which an element of the input is an outlier, which keeps its channel in full
            precision. 0 keeps nothing in full precision. The paper has 6.0.

    Source:
        LLM.int8() (Dettmers et al., NeurIPS 2022).
    """

    threshold: Annotated[float, Field(ge=0)] = 6.0

    def check(self, weights: Format | None, activations: Format | None) -> None:
        for name, asked in (("weights", weights), ("activations", activations)):
            if asked is not None and asked != INT8:
                raise UserError(f"llm_int8 is int8 by definition: write {name}: {{bits: 8, symmetric: true}}")

    def prepare(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
        calibration: Any = None,
    ) -> dict[str, LinearPlan]:
        self.check(weights, activations)
        plans = {}
        for name in linears:
            activation = Mixed(self.threshold) if activations else None
            plans[name] = LinearPlan(Int8Rows() if weights else None, activation)
        return plans


class Mixed(TokenActivation):
    """Quantization of tokens to int8, except in the outlier channels of their sample.

    Args:
        threshold: magnitude from which an element is an outlier; 0 for no outliers.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, x: Tensor, tokens: Tokens | None = None) -> Tensor:
        outlying = x.half().abs() >= self.threshold if self.threshold else torch.zeros_like(x, dtype=torch.bool)
        counted = outlying if tokens is None else outlying & tokens.valid.unsqueeze(-1)
        channels = counted.any(dim=-2, keepdim=True) if x.ndim > 1 else counted
        rounded = int8_rows(x.masked_fill(outlying, 0))
        self.exact = channels
        return torch.where(channels, x, rounded)


class Int8Rows:
    """Rounding of a weight by `int8_rows`."""

    def __call__(self, w: Tensor) -> Tensor:
        return int8_rows(w)

    def packed(self, w: Tensor) -> PackedWeight:
        scale = w.half().float().abs().amax(dim=-1, keepdim=True) / TOP
        grid = Grid(torch.where(scale == 0, 1, scale), torch.zeros_like(scale), -TOP, TOP)
        return packed_on(int8_rows(w.float()), [grid], INT8)


def int8_rows(x: Tensor) -> Tensor:
    """Quantize each row of x [..., D] to 255 symmetric levels and dequantize it: same shape and dtype.

    Values are rounded to float16 first, as in bitsandbytes. The rest is computed in float32; ties go to the even level.
    """
    half = x.half().float()
    scale = half.abs().amax(dim=-1, keepdim=True)
    levels = (half * (TOP / torch.where(scale == 0, 1, scale))).round()
    return (levels * (scale / TOP)).to(x.dtype)
