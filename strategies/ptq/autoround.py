"""AutoRound: rounding and ranges of weights are learned by signed gradient descent (SignRound)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from qapbench import (
    AbsMaxObserver,
    Block,
    CalibratedPTQ,
    Calibration,
    CalibrationResult,
    Format,
    LinearPlan,
    UserError,
    installed_all,
    kept_rounding,
    packed_tensors,
    ptq,
)

from .full_precision import FullPrecision
from .signed_descent import learn
from .signed_levels import grids, rounded


@ptq("autoround")
@dataclass(frozen=True)
class AutoRound(CalibratedPTQ):
    """Learn what is added to each weight before it is rounded, and the ends of each group's range.

    The rounded weight is s clamp(round(w / s + v)), with the range [min * low, max * high] of a group of weights. v
    starts at 0, the factors low and high, which stay in [0, 1], at 1. Each step takes the gradient of the squared error
    of a decoder layer's output on a few samples, and moves every parameter by the learning rate against the gradient's
    sign. The rate falls linearly from 1 / iters to 0. The parameters of the step with the least error are kept. Layers
    are tuned in order, on the outputs of the quantized layers before them, towards the outputs that the model has in
    full precision. Activations are rounded dynamically, as in `rtn`, also while the weights are tuned.

    Symmetric levels are those of the release: the end of the range with the larger magnitude becomes -2^(b-1) scales,
    so the scale has a sign. Two things differ from the released code. Scales stay float32; the release rounds them to
    float16. The error of a sample counts by its number of tokens, because samples differ in length here.

    Attributes:
        iters: number of steps. The release has 200.
        batch: samples per step. The release has 8.
        seed: decides which samples each step takes.

    Source:
        SignRound (Cheng et al., EMNLP Findings 2024), eq. 3 and 4; auto-round 0.16.1.
    """

    iters: Annotated[int, Field(ge=0)] = 200
    batch: Annotated[int, Field(ge=1)] = 8
    seed: Annotated[int, Field(ge=0)] = 0

    weight_formats = ("int",)

    def check(self, weights: Format | None, activations: Format | None) -> None:
        super().check(weights, activations)
        if weights is not None and (weights.divisor, weights.zero_point) != ("qmax", "in_range"):
            raise UserError("weights: autoround has levels of its own; leave `divisor` and `zero_point` out")

    def calibrate(
        self,
        calibration: Calibration,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
    ) -> CalibrationResult:
        if weights is None:
            return {name: {} for name in linears}
        plain = FullPrecision()

        def find(block: Block) -> CalibrationResult:
            exact = plain.outputs(block)
            called = block.observe(lambda _: AbsMaxObserver())
            return self.tuned(block, {name: linears[name] for name in called}, exact, weights, activations)

        return calibration.block_by_block(linears, find, lambda found: self.plan(found, weights, activations))

    def tuned(
        self,
        block: Block,
        linears: Mapping[str, nn.Linear],
        wanted: list[Tensor],
        weights: Format,
        activations: Format | None,
    ) -> CalibrationResult:
        """The rounded "weight" [out, in] of some linears of a block, given its outputs in full precision."""
        draw = torch.Generator().manual_seed(self.seed)
        count = min(self.batch, len(block.passes))
        batches = (torch.randperm(len(block.passes), generator=draw)[:count].tolist() for _ in range(self.iters))

        def error(new: Mapping[str, Tensor], batch: list[int]) -> Tensor:
            return torch.stack(
                [block.off(i, block.forward(block.passes[i], new), wanted[i]).sum() for i in batch]
            ).sum()

        original = {name: linear.weight.detach() for name, linear in linears.items()}
        with installed_all(linears, LinearPlan(None, activations), lambda: block.current[0]):
            found = learn(original, weights, error, batches, self.iters)
        kept: CalibrationResult = {}
        for name, w in original.items():
            v, low, high = found[name]
            values = rounded(w.float(), weights, v, low, high)
            kept[name] = packed_tensors(values, grids(w, weights, low, high), weights)
        return kept

    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        return LinearPlan(kept_rounding(found) if weights else None, activations)
