"""SmoothQuant: outlier channels of the activations are moved into the weights."""

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

FLOOR = 1e-5  # smallest scale, and smallest magnitude of a weight column in it


@ptq("smoothquant")
@dataclass(frozen=True)
class SmoothQuant(CalibratedPTQ):
    """Divide each input channel by a scale from calibration, multiply the weight's column by it, and round both.

    The scale of a channel is s = max|x|^alpha / max|W|^(1 - alpha). Only linears that read the output of a norm are
    scaled. The others, the output and down projections, are rounded as they are. Activations are rounded dynamically,
    as in `rtn`.

    Attributes:
        alpha: exponent of the input's largest magnitude; the weight's has 1 - alpha. Larger values move more of the
            difficulty from the activations to the weights. The paper has 0.5.

    Source:
        SmoothQuant (Xiao et al., ICML 2023), eq. 4.
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
        """Compute the "scale" [in] of each linear of a block that reads a norm's output."""
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
