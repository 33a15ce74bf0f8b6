"""`CalibratedPTQ`: base class of methods that compute something from samples and make plans from it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from qapbench.hashing import digest_code
from qapbench.methods.kinds import metrics
from qapbench.methods.quantization import PTQ, Format, LinearPlan

from .blocks import check_finite
from .runner import Calibration
from .samples import CalibrationResult


class CalibratedPTQ(PTQ):
    """A quantization method that runs samples through the model first.

    Subclasses define `calibrate` and `plan`. The result of `calibrate` is all that `plan` gets. It is kept on disk, so
    that a sweep calibrates once.
    """

    calibrates: ClassVar[bool] = True

    @abc.abstractmethod
    def calibrate(
        self,
        calibration: Calibration,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
    ) -> CalibrationResult:
        """Compute what the plans are made from.

        Args:
            calibration: runs the samples through the model.
            linears: the linears in scope, by their name in the model.
            weights: the format asked for; None leaves weights in the model's precision.
            activations: the format asked for; None leaves activations in the model's precision.

        Returns:
            For each linear, tensors by name. A linear that is left out stays in full precision; the receipt reports it
            as a fallback.
        """

    @abc.abstractmethod
    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        """Make the plan of one linear.

        Args:
            found: the linear's tensors in the result of `calibrate`.
            weights: the format asked for.
            activations: the format asked for.
        """

    def prepare(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
        calibration: Any = None,
    ) -> dict[str, LinearPlan]:
        """Calibrate, unless a cached result fits, and make the plans; see `PTQ.prepare`.

        Without formats nothing is calibrated.

        Raises:
            UserError: the method does not support the formats, or a weight or an input of a linear is not finite.
        """
        if weights is None and activations is None:
            return dict.fromkeys(linears, LinearPlan())
        self.check(weights, activations)
        for name, linear in linears.items():
            check_finite(linear.weight, f"the weight of {name}")
        runner = Calibration.over(model, calibration, type(self).__name__.lower())
        found = runner.cached(
            lambda: self._identity(linears, weights, activations),
            lambda: self.calibrate(runner, linears, weights, activations),
        )
        return {name: self.plan(found[name], weights, activations) for name in linears if name in found}

    def _identity(
        self, linears: Mapping[str, nn.Linear], weights: Format | None, activations: Format | None
    ) -> dict[str, Any]:
        """What a cached result depends on besides samples and model."""
        used = {name: digest_code(metrics.entry(name).target) for name in self.used_metrics}
        return {
            **({"metrics": used} if used else {}),
            "method": f"{type(self).__module__}.{type(self).__qualname__}",
            "source": digest_code(type(self)),
            "params": {name: repr(v) for name, v in dataclasses.asdict(self).items()},  # type: ignore[call-overload]
            "weights": weights.model_dump() if weights else None,
            "activations": activations.model_dump() if activations else None,
            "linears": {name: [*linear.weight.shape, str(linear.weight.dtype)] for name, linear in linears.items()},
        }
