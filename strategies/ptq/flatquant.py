"""FlatQuant: affine transforms and clipping are learned for the linears of each block."""

import math
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
    Fraction,
    LinearPlan,
    kept_rounding,
    kronecker_by,
    near_square,
    ptq,
)

from .clipped_levels import ClippedInput
from .flat_block import FlatBlock


@ptq("flatquant")
@dataclass(frozen=True)
class FlatQuant(CalibratedPTQ):
    """Learn an invertible map of each linear's input, with which inputs and weights are flat, and the shares of ranges.

    The input becomes (x d) (P1 kron P2) and the weight (W / d) (P1 kron P2)^-T. P1 and P2 are as nearly of one size as
    can be, and each is U diag(s) V^T with orthogonal U and V, which stay so as Cayley transforms; U and V start at
    random, s at 1, and d at max|W|^(1 - alpha) / max|x|^alpha. Linears that read one input share its map. Values are
    multiplied by a matrix per head, and the output projection reads (P_heads kron that matrix). The range of a group
    of weights is cut to [sigmoid(b) min, sigmoid(g) max], and the weights with it; the range of a token's input is cut
    by two numbers for each linear's input. All of it is learned by AdamW on ||F(X) - F_quantized(X)||^2 over a decoder
    layer's inputs in full precision, with a rate that falls to 0 as a cosine. Weights are then rounded to nearest.

    What differs from the released code: the maps stay at the linears, where the release merges d into the norm and the
    up projection, so every linear has a d. Keys are not mapped: that matters to a quantized KV cache alone. Rounding by
    GPTQ, an option of the release, is left out. The release learns in float16.

    Attributes:
        epochs: passes over the samples per block. The release has 15.
        batch: samples per step. The release has 4.
        lr: learning rate. The release's scripts have 5e-3; shares of ranges have ten times as much.
        alpha: exponent of the input's largest magnitude in the initial d. The release has 0.3.
        seed: of U, V and the order of samples.

    Source:
        FlatQuant (Sun et al., ICML 2025), eq. 2 to 5; ruikangliu/FlatQuant at 9d88ffc, MIT.
    """

    epochs: Annotated[int, Field(ge=0)] = 15
    batch: Annotated[int, Field(ge=1)] = 4
    lr: Annotated[float, Field(gt=0)] = 5e-3
    alpha: Fraction = 0.3
    seed: Annotated[int, Field(ge=0)] = 0

    formats = (Format(bits=4, symmetric=True), Format(bits=4, symmetric=True))
    weight_formats = ("int",)  # a floating-point scale takes few values, so that there is no gradient to learn from
    activation_granularities = ("row",)

    def calibrate(
        self,
        calibration: Calibration,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
    ) -> CalibrationResult:
        def find(block: Block) -> CalibrationResult:
            wanted = [block.spill.keep(output) for output in block.outputs()]
            largest = {name: seen.value for name, seen in block.observe(lambda _: AbsMaxObserver()).items()}
            flat = FlatBlock(calibration.model, block, largest, weights, activations, self.alpha, self.seed)
            self.fit(block, flat, wanted)
            return flat.found()

        return calibration.block_by_block(linears, find)

    def fit(self, block: Block, flat: FlatBlock, wanted: list[Tensor]) -> None:
        """Learn what a block has to learn.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        rates = ((flat.maps, self.lr), (flat.clips, 10 * self.lr))
        optimizer = torch.optim.AdamW([{"params": some, "lr": rate} for some, rate in rates if some])  # decay 0.01
        steps = self.epochs * math.ceil(len(wanted) / self.batch)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        size = sum(float(output.float().square().mean()) for output in wanted) / max(len(wanted), 1) or 1.0
        draw = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            for batch in torch.randperm(len(wanted), generator=draw).split(self.batch):
                optimizer.zero_grad()
                for index in batch.tolist():
                    with torch.enable_grad():
                        output = block.forward(block.passes[index], flat.held(), flat.read())
                        loss = block.off(index, output, wanted[index]).mean() / (len(batch) * size)
                    if not torch.isfinite(loss):
                        raise ArithmeticError(f"{block.name}: the loss is not finite; lower lr")
                    loss.backward(inputs=[*flat.maps, *flat.clips])
                optimizer.step()
                falling.step()

    def online_flops(self, name: str, inward: int, outward: int, of_norm: bool) -> int:
        """P1 and P2 of each linear's input, as if each linear had its own, and an output projection both."""
        return 2 * inward * sum(near_square(inward))

    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        read = ClippedInput(activations, *found["clip"]) if activations else None
        return LinearPlan(kept_rounding(found) if weights else None, read, kronecker_by(found))
