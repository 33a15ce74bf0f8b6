"""Q-VLM as its authors released it: NF4 weights, and 4-bit activations with one range per channel."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from qapbench import (
    Block,
    CalibratedPTQ,
    Calibration,
    CalibrationResult,
    Format,
    LinearPlan,
    TokenActivation,
    Tokens,
    UserError,
    normal_float,
    ptq,
)

NF4 = Format(bits=4, group_size=64)
CHANNEL = Format(bits=4, granularity="channel", zero_point="free")
SHARES = 7  # number of shares of a static range that are tried: 1.0, 0.9, ..., 0.4
EPSILON = 1e-7  # keeps the logarithm of the entropy finite


@ptq("qvlm")
@dataclass(frozen=True)
class QVLM(CalibratedPTQ):
    """Quantize weights to NF4, and activations to 16 levels of each channel's range over the tokens.

    Weights are NF4 in blocks of 64 with quantized scales. Activation ranges of linears that read a norm's output are
    static: they contain zero and come from calibration. All other linears, the output and down projections, take the
    range of the prompt (prefill). Both kinds of range grow by every token that is generated.

    Calibration goes block by block, with the activations of earlier blocks quantized. The paper's entropy-based
    partition of the model is only a gate in the released code, and so it is here. A sample updates the range of a
    linear in three cases: it is the first sample; the block is one of every `period`; the input of the linear before
    had a high entropy on this sample. After that, of the shares 1.0, 0.9 to 0.4 of a range the one with the least mean
    |error|^0.5 is taken.

    One thing differs from the released code, in which a batch has one range. Here each sample has its own, and padding
    does not enter it.

    Attributes:
        entropy: entropy of the input of the linear before from which a sample updates a range. It is the mean over
            channels of -sum a log a, where a is |x| with each channel at unit length over the tokens. The release has
            37.
        period: number of blocks from one that updates its ranges on every sample to the next, starting with the first
            block. The release has 3.
        searched: number of samples, the last ones with an image, on which the shares of a range are compared.

    Source:
        Q-VLM (Wang et al., NeurIPS 2024), as in the released code (ChangyuanWang17/QVLM).
    """

    entropy: float = 37.0
    period: Annotated[int, Field(ge=1)] = 3
    searched: Annotated[int, Field(ge=1)] = 2

    formats = (NF4, CHANNEL)
    activation_granularities = ("channel",)

    def check(self, weights: Format | None, activations: Format | None) -> None:
        for side, asked, made in (("weights", weights, NF4), ("activations", activations, CHANNEL)):
            if asked not in (None, made):
                raise UserError(f"qvlm is one pair of formats by definition: leave {side} out (here {made})")

    def calibrate(
        self,
        calibration: Calibration,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
    ) -> CalibrationResult:
        if activations is None:
            return {name: {} for name in linears}
        gate = Gate(self.entropy, self.period)

        def find(block: Block) -> CalibrationResult:
            gate.block += 1
            static = [name for group in block.groups() if group.norm for name in group.linears]
            with_images = [i for i, one in enumerate(block.passes) if one.tokens is None or one.tokens.vision.any()]
            last = with_images[-self.searched :]
            seen = block.observe(lambda _: StaticRange(gate, last))
            return {name: dict(seen[name].best()) if name in static else {} for name in seen}

        return calibration.block_by_block(linears, find, lambda found: self.plan(found, weights, activations))

    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        static = (found["low"], found["high"]) if "low" in found else None
        return LinearPlan(normal_float if weights else None, RunningRange(static) if activations else None)


class RunningRange(TokenActivation):
    """Quantization with one range per channel and sample, which every generated token widens.

    Args:
        static: lowest and highest values, each [in], with which every sequence starts; None takes those of its prompt.
    """

    def __init__(self, static: tuple[Tensor, Tensor] | None = None) -> None:
        self.static = static
        self.range: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, tokens: Tokens | None = None) -> Tensor:
        valid = None if tokens is None else tokens.valid
        held = self.range
        if tokens is None or tokens.prefill or held is None:
            held = self.static or CHANNEL.range(x, valid)
        else:
            low, high = CHANNEL.range(x, valid)
            held = torch.minimum(held[0], low), torch.maximum(held[1], high)
        self.range = held
        return CHANNEL.levels.grid(*held)(x)


@dataclass
class Gate:
    """Decides whether a sample updates the range of a linear.

    Attributes:
        entropy: entropy of the latest linear's input from which a sample does.
        period: number of blocks from one in which all samples do to the next.
        block: number of the current block, counted from 1.
        entropies: entropy of the latest linear's quantized input, by sample.
    """

    entropy: float
    period: int
    block: int = 0
    entropies: dict[int, float] = field(default_factory=dict)

    def opens(self, sample: int) -> bool:
        """Whether the sample of this index updates the range. The first one always does."""
        return sample == 0 or (self.block - 1) % self.period == 0 or self.entropies.get(sample, 0.0) >= self.entropy


class StaticRange:
    """Observer of a linear's input: its range over the samples, and the best share of it.

    Args:
        gate: decides which samples update the range.
        searched: indices of the samples on which shares of the range are compared.

    Attributes:
        sample: index of the next sample.
        low: [in] lowest values, at most 0.
        high: [in] highest values, at least 0.
        rows: inputs [T, in] of the samples in `searched`, in host memory.
    """

    def __init__(self, gate: Gate, searched: list[int]) -> None:
        self.gate, self.searched = gate, searched
        self.sample = 0
        self.low: Tensor
        self.high: Tensor
        self.rows: list[Tensor] = []

    def __call__(self, x: Tensor, vision: Tensor) -> None:
        if self.sample == 0:
            self.low, self.high = x.new_zeros(2, x.shape[-1], dtype=torch.float32)
        if self.gate.opens(self.sample):
            low, high = CHANNEL.range(x)
            self.low, self.high = torch.minimum(self.low, low[0]), torch.maximum(self.high, high[0])
        self.gate.entropies[self.sample] = entropy(CHANNEL.levels.grid(self.low, self.high)(x.float()))
        if self.sample in self.searched:
            self.rows.append(x.to("cpu"))
        self.sample += 1

    def best(self) -> Mapping[str, Tensor]:
        """The range, "low" and "high" [in], shrunk to the share of it with the least mean |error|^0.5."""

        def loss(share: float) -> float:
            grid = CHANNEL.levels.grid(self.low * share, self.high * share)
            return sum(float((grid(x) - x).abs().sqrt().mean()) for x in (r.to(self.low).float() for r in self.rows))

        share = min((1 - step / 10 for step in range(SHARES)), key=loss)
        return {"low": self.low * share, "high": self.high * share}


def entropy(x: Tensor) -> float:
    """Compute the mean over channels of -sum a log a, where a is |x| with each channel at unit length over the tokens.

    Args:
        x: [T, in].
    """
    a = normalize(x.abs(), dim=0)
    return float(-(a * (a + EPSILON).log()).sum(dim=0).mean())
