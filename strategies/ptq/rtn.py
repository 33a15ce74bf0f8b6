"""Rounding to nearest, the baseline of all other methods."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qapbench import PTQ, Format, LinearPlan, ptq


@ptq("rtn")
@dataclass(frozen=True)
class RTN(PTQ):
    """Round every weight to the nearest level of its format, and activations dynamically.

    Ranges of activations are those of the values at hand: of each token, or of each sample if the format says so.

    Source:
        No paper. The usual definition.
    """

    weight_granularities = ("row", "channel", "tensor", "block")

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
