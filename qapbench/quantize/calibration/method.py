"""`CalibratedPTQ`: base class of methods that compute something from samples and make plans from it."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from qapbench.hashing import digest_code
from qapbench.methods.formats import Format, LinearFormats, by_formats
from qapbench.methods.kinds import metrics
from qapbench.methods.plans import LinearPlan
from qapbench.methods.quantization import PTQ

from .capturing import check_finite
from .runner import Calibration
from .samples import CalibrationResult
from .several import calibrated_together


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
        _check_weights(linears)
        runner = Calibration.over(model, calibration, type(self).__name__.lower())
        found = runner.cached(
            lambda: self._identity(linears, weights, activations),
            lambda: self.calibrate(runner, linears, weights, activations),
        )
        return {name: self.plan(found[name], weights, activations) for name in linears if name in found}

    def _prepare_several(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        formats: Mapping[str, LinearFormats],
        calibration: Any,
    ) -> dict[str, LinearPlan]:
        """The plans of linears in formats that may differ. Blocks are calibrated in order, as their linears will be.

        What a method finds for several linears of a block together is found as if all of them had the format.
        """
        groups = by_formats(linears, formats)
        if len(groups) < 2:
            return super()._prepare_several(model, linears, formats, calibration)
        for pair in groups:
            self.check(*pair)
        _check_weights(linears)
        runner = Calibration.over(model, calibration, type(self).__name__.lower())

        def find() -> CalibrationResult:
            methods = {
                pair: (lambda runner, pair=pair: self.calibrate(runner, linears, *pair), names)
                for pair, names in groups.items()
            }
            return {
                name: one for result in calibrated_together(runner, methods).values() for name, one in result.items()
            }

        def about() -> dict[str, Any]:
            several = [[_plain(pair), names] for pair, names in groups.items()]
            return {**self._identity(linears, None, None), "several": several}

        found = runner.cached(about, find)
        return {name: self.plan(found[name], *formats[name]) for name in linears if name in found}

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
            **dict(zip(("weights", "activations"), _plain((weights, activations)), strict=True)),
            "linears": {name: [*linear.weight.shape, str(linear.weight.dtype)] for name, linear in linears.items()},
        }


def _check_weights(linears: Mapping[str, nn.Linear]) -> None:
    """Check that all weights are finite."""
    for name, linear in linears.items():
        check_finite(linear.weight, f"the weight of {name}")


def _plain(pair: tuple[Format | None, Format | None]) -> list[dict[str, Any] | None]:
    """Formats of weights and activations as plain data."""
    return [None if one is None else one.model_dump() for one in pair]
