"""Round to nearest."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qapbench import PTQ, Format, LinearPlan, ptq


@ptq("rtn")
@dataclass(frozen=True)
class RTN(PTQ):
    """Rounds every weight to the nearest level of its format; activations dynamically, token by token."""

    weight_granularities = ("row", "channel", "tensor")

    def prepare(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
        calibration: Any = None,
    ) -> dict[str, LinearPlan]:
        self.check(weights, activations)
        return dict.fromkeys(linears, LinearPlan(weights, activations))
