"""Q-VLM as its authors released it: NF4 weights, and 4-bit activations with one range per channel."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Annotated, Literal

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
    NormalFloat,
    TokenActivation,
    Tokens,
    UserError,
    ptq,
)

NF4 = Format(bits=4, group_size=64)
CHANNEL = Format(bits=4, granularity="channel", zero_point="free")
FIXED = 37.0  # threshold of the first release's gate
SHARES = 7  # number of shares of a static range that are tried: 1.0, 0.9, ..., 0.4
EPSILON = 1e-7  # keeps the logarithm of the entropy finite
OFFSET = 1e-5  # keeps quotient and logarithm of the discrepancy finite


@ptq("qvlm")
@dataclass(frozen=True)
class QVLM(CalibratedPTQ):
    """Quantize weights to NF4, and activations to 16 levels of each channel's range over the tokens.

    Weights are NF4 in blocks of 64 with quantized scales. Activation ranges of linears that read a norm's output are
    static: they contain zero and come from calibration. All other linears, the output and down projections, take the
    range of the prompt (prefill). Both kinds of range grow by every token that is generated.

    Calibration goes block by block, with the activations of earlier blocks quantized. The paper's entropy-based
    partition of the model is only a gate in the released code, and so it is here. A sample updates the range of a
    linear in three cases: it is the first sample; the block is one of every `period`; the value of the linear before
    was high on this sample. With `gate: running`, that value is the entropy of the quantized input of a block's first
    linear and wherever the width of the inputs changes (in LLaMA: of the query and the down projection), and elsewhere
    the discrepancy (DED) between this input and the one before; it is high if it reaches the mean of the values of all
    linears before on this sample. With `gate: fixed`, it is always the entropy, and high from `entropy`. After that, of
    the shares 1.0, 0.9 to 0.4 of a range the one with the least mean |error|^0.5 is taken.

    One thing differs from the released code, in which a batch has one range. Here each sample has its own, and padding
    does not enter it.

    Attributes:
        gate: how it is decided whether a sample updates a range. "running" is the code as released since 17 December
            2024 (6ceab64), which the authors of QAPruner ran too; "fixed" is the first release, of 10 October 2024.
        entropy: for `gate: fixed`, entropy from which a sample updates the range of the next linear. It is the mean
            over channels of -sum a log a, where a is |x| with each channel at unit length over the tokens. The first
            release has 37.
        period: number of blocks from one that updates its ranges on every sample to the next, starting with the first
            block. The release has 3.
        searched: number of samples, the last ones with an image, on which the shares of a range are compared.

    Source:
        Q-VLM (Wang et al., NeurIPS 2024), as in the released code (ChangyuanWang17/QVLM).
    """

    gate: Literal["running", "fixed"] = "running"
    entropy: float = FIXED
    period: Annotated[int, Field(ge=1)] = 3
    searched: Annotated[int, Field(ge=1)] = 2

    formats = (NF4, CHANNEL)
    activation_granularities = ("channel",)

    def check(self, weights: Format | None, activations: Format | None) -> None:
        if self.gate == "running" and self.entropy != FIXED:
            raise UserError("qvlm: `entropy` is the threshold of `gate: fixed`; set that too, or leave `entropy` out")
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
        gates: dict[str, Gate] = {}  # one for each list of layers

        def find(block: Block) -> CalibrationResult:
            layers = block.name.rpartition(".")[0]
            gate = gates.setdefault(layers, Gate(self.entropy if self.gate == "fixed" else None, self.period))
            gate.block += 1
            static = [name for group in block.groups() if group.norm for name in group.linears]
            with_images = [i for i, one in enumerate(block.passes) if one.tokens is None or one.tokens.vision.any()]
            last = with_images[-self.searched :]
            seen = block.observe(lambda _: StaticRange(gate, last))
            return {name: dict(seen[name].best()) if name in static else {} for name in seen}

        return calibration.block_by_block(linears, find, lambda found: self.plan(found, weights, activations))

    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        static = (found["low"], found["high"]) if "low" in found else None
        return LinearPlan(NormalFloat() if weights else None, RunningRange(static) if activations else None)


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
        threshold: entropy of the latest linear's input from which a sample does; None for the mean of the values.
        period: number of blocks from one in which all samples do to the next.
        block: number of the current block, counted from 1.
        values: by sample, the values of all linears so far. NaN is left out, as in the release.
        latest: by sample, the value of the latest linear. NaN opens nothing.
        before: the input that was noted last, and the block and the sample that it was of.
    """

    threshold: float | None
    period: int
    block: int = 0
    values: dict[int, list[float]] = field(default_factory=dict)
    latest: dict[int, float] = field(default_factory=dict)
    before: tuple[tuple[int, int], Tensor] | None = None

    def opens(self, sample: int) -> bool:
        """Whether the sample of this index updates the range. The first one always does."""
        if sample == 0 or (self.block - 1) % self.period == 0:
            return True
        values = self.values.get(sample, [])
        return bool(values) and self.latest[sample] >= (fmean(values) if self.threshold is None else self.threshold)

    def note(self, sample: int, x: Tensor) -> None:
        """Take in the quantized input [T, in] of the linear that was decided upon last."""
        place, before = (self.block, sample), self.before
        follows = before is not None and before[0] == place and before[1].shape == x.shape
        value = discrepancy(before[1], x) if before and follows and self.threshold is None else entropy(x)
        self.before, self.latest[sample] = (place, x), value
        if not math.isnan(value):
            self.values.setdefault(sample, []).append(value)


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
        self.gate.note(self.sample, CHANNEL.levels.grid(self.low, self.high)(x.float()))
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


def discrepancy(before: Tensor, x: Tensor) -> float:
    """Compute the discrepancy (DED) of the quantized inputs of two linears: the mean over channels of -sum j log c.

    With p and q = |x| of the first and the second input, each channel at unit sum over the tokens, j is p q and c is
    q / p, each at unit sum again. NaN if the two have no token in common that is not zero, in any channel.

    Args:
        before: [T, in].
        x: [T, in].
    """
    p, q = (normalize(values.abs(), p=1, dim=0) for values in (before, x))
    joint, conditional = p * q, q / (p + OFFSET)
    joint, conditional = joint / joint.sum(dim=0), conditional / conditional.sum(dim=0)
    return float(-(joint * (conditional + OFFSET).log()).sum(dim=0).mean())
