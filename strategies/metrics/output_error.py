"""Sensitivity metrics of the language model's first linears: what they get wrong if a token is quantized."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qapbench import Bits, FirstReads, GroupSize, ModelMetric, fake_quantize, metric

Keep = Literal["sensitive", "robust"]


@metric("output_error")
@dataclass(frozen=True)
class OutputError(ModelMetric):
    """Compute ||W (x - Q(x))||_2 / ||W x||_2 of each token: [B, N, D] -> [B, N].

    x is the token behind the first norm, W the weights of query, key and value one below the other, and Q the
    quantization of activations. An error in a direction that no linear reads counts nothing, and one that is read
    strongly counts much, while the error of the token itself treats all directions alike. docs/sensitivities.md derives
    it.

    Attributes:
        bits: bits per value of the simulated quantization.
        group_size: consecutive channels of a token that share one scale.
        symmetric: whether levels are symmetric around zero.
        relative: whether the error is divided by the size of the output.
        keep: "sensitive" scores tokens with a large error high, "robust" the others.

    Source:
        No paper. A metric of this benchmark.
    """

    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    relative: bool = True
    keep: Keep = "sensitive"

    def scores(self, tokens: Tensor, reads: FirstReads) -> Tensor:
        x, weight = reads.normed(tokens), torch.cat(reads.weights)
        error = ((x - fake_quantize(x, self.bits, self.group_size, self.symmetric)) @ weight.T).norm(dim=-1)
        if self.relative:
            error = error / (x @ weight.T).norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        return error if self.keep == "sensitive" else -error


@metric("attended_error")
@dataclass(frozen=True)
class AttendedError(ModelMetric):
    """Compute a ||W_v (x - Q(x))||_2 of each token: [B, N, D] -> [B, N].

    x is the token behind the first norm, W_v the weights of the values, Q the quantization of activations, and a the
    attention that the mean query of the image's tokens gives it. This is what the token's error adds to the tokens that
    attend to it, so that leaving it out takes this error from them. docs/sensitivities.md derives it.

    Attributes:
        bits: bits per value of the simulated quantization.
        group_size: consecutive channels of a token that share one scale.
        symmetric: whether levels are symmetric around zero.
        keep: "robust" scores tokens high that add little error, "sensitive" the others.

    Source:
        No paper. A metric of this benchmark.
    """

    bits: Bits = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    keep: Keep = "robust"

    def scores(self, tokens: Tensor, reads: FirstReads) -> Tensor:
        x = reads.normed(tokens)
        error = (x - fake_quantize(x, self.bits, self.group_size, self.symmetric)) @ reads.weights[-1].T
        added = reads.attention(x) * error.norm(dim=-1)
        return added if self.keep == "sensitive" else -added
