"""SmoothQuant (Xiao et al., ICML 2023, eq. 4): outlier channels of activations moved into the weights."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn, stack

from qapbench import (
    AbsMaxObserver,
    Block,
    CalibratedPTQ,
    Calibration,
    CalibrationResult,
    Format,
    Fraction,
    LinearPlan,
    Scaling,
    ptq,
)

FLOOR = 1e-5


@ptq("smoothquant")
@dataclass(frozen=True)
class SmoothQuant(CalibratedPTQ):
    """s = max|x|^alpha / max|W|^(1 - alpha) for each channel that a norm gives to linears; x / s and W s are rounded.

    Linears behind anything but a norm (attention output, down projection) are rounded as they are.
    """

    alpha: Fraction = 0.5

    def calibrate(
        self,
        calibration: Calibration,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
    ) -> CalibrationResult:
        return calibration.block_by_block(linears, self.scales)

    def scales(self, block: Block) -> CalibrationResult:
        inputs = block.observe(lambda _: AbsMaxObserver())
        found: CalibrationResult = {}
        for group in block.groups():
            found |= {name: {} for name in group.linears}
            if group.norm is not None:
                x = inputs[next(iter(group.linears))].value
                w = stack([linear.weight.detach().float().abs().amax(dim=0) for linear in group.linears.values()])
                scale = x**self.alpha / w.amax(dim=0).clamp(min=FLOOR) ** (1 - self.alpha)
                found |= {name: {"scale": scale.clamp(min=FLOOR)} for name in group.linears}
        return found

    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        transform = Scaling(found["scale"]) if "scale" in found else None
        return LinearPlan(weights, activations, transform)
