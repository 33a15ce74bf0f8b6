"""Q-VLM (Wang et al., NeurIPS 2024) as its authors released it: NF4 weights, 4-bit activations, a scale a channel."""

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
SHARES = 7  # of a static range that are tried: 1.0, 0.9, ..., 0.4
EPSILON = 1e-7


@ptq("qvlm")
@dataclass(frozen=True)
class QVLM(CalibratedPTQ):
    """NF4 in blocks of 64 with quantized scales; activations in 16 levels of each channel's range over the tokens.

    Linears behind a norm whose width is the model's have static ranges, which reach zero and come from calibration;
    output and down projections take those of the prefill. Either grows by what is decoded behind it. Padding enters
    no range, and each sample has its own (the release has one for a batch).

    Calibration is sequential, activations quantized in the blocks in front. The paper's entropy-based partition is
    only a gate there: a range is updated where the linear before had an entropy of at least `entropy` on that sample,
    in each `period`-th block, and at a linear's first sample. Of shares 1.0 to 0.4 of a range the last `searched`
    samples with images choose the one with the least mean |error|^0.5.
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
    """A range for each channel of each sample: static or the prefill's, then widened by every decoded token."""

    def __init__(self, static: tuple[Tensor, Tensor] | None = None) -> None:
        self.static = static
        self.range: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, tokens: Tokens | None = None) -> Tensor:
        valid = None if tokens is None else tokens.valid
        held = self.range
        if tokens is None or tokens.prefill or held is None:
            held = (
                (self.static[0].to(x.device), self.static[1].to(x.device)) if self.static else CHANNEL.range(x, valid)
            )
        else:
            low, high = CHANNEL.range(x, valid)
            held = torch.minimum(held[0], low), torch.maximum(held[1], high)
        self.range = held
        return CHANNEL.levels.grid(*held)(x)


@dataclass
class Gate:
    """Whether a sample updates a linear's range.

    Attributes:
        block: number of the block under way, from 1.
        entropies: of the latest linear's quantized input, by sample.
    """

    entropy: float
    period: int
    block: int = 0
    entropies: dict[int, float] = field(default_factory=dict)

    def opens(self, sample: int) -> bool:
        return sample == 0 or (self.block - 1) % self.period == 0 or self.entropies.get(sample, 0.0) >= self.entropy


class StaticRange:
    """Gathers one linear's range over samples, and which share of it is best.

    Attributes:
        low, high: [in].
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
        def loss(share: float) -> float:
            grid = CHANNEL.levels.grid(self.low * share, self.high * share)
            return sum(float((grid(x) - x).abs().sqrt().mean()) for x in (r.to(self.low).float() for r in self.rows))

        share = min((1 - step / 10 for step in range(SHARES)), key=loss)
        return {"low": self.low * share, "high": self.high * share}


def entropy(x: Tensor) -> float:
    """Of |x| [T, in], each channel at unit length over the tokens: mean over channels of -sum a log a."""
    a = normalize(x.abs(), dim=0)
    return float(-(a * (a + EPSILON).log()).sum(dim=0).mean())
