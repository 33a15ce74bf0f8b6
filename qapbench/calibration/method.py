"""What a calibrating method is made of: what it looks for, and what it makes of what it found."""

from __future__ import annotations

import abc
import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from qapbench.checkpoints import digest_file
from qapbench.quantization import PTQ, Format, LinearPlan

from .runner import Calibration
from .samples import Found


class CalibratedPTQ(PTQ):
    """A method that looks at samples first. Subclasses say what they look for and what they make of it.

    What `calibrate` found is all that `plan` gets: it is what is kept on disk, so that a sweep calibrates once.
    """

    calibrates: ClassVar[bool] = True

    @abc.abstractmethod
    def calibrate(
        self, calibration: Calibration, linears: Mapping[str, nn.Linear], weights: Format | None,
        activations: Format | None,
    ) -> Found:  # fmt: skip
        """Named tensors for each linear. A linear that is left out stays in full precision, as a fallback."""

    @abc.abstractmethod
    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        """The plan of one linear."""

    def prepare(
        self, model: nn.Module, linears: Mapping[str, nn.Linear], weights: Format | None, activations: Format | None,
        calibration: Any = None,
    ) -> dict[str, LinearPlan]:  # fmt: skip
        if weights is None and activations is None:
            return dict.fromkeys(linears, LinearPlan())
        self.check(weights, activations)
        runner = Calibration.over(model, calibration, type(self).__name__.lower())
        found = runner.recall(
            self._identity(linears, weights, activations),
            lambda: self.calibrate(runner, linears, weights, activations),
        )
        return {name: self.plan(found[name], weights, activations) for name in linears if name in found}

    def _identity(
        self, linears: Mapping[str, nn.Linear], weights: Format | None, activations: Format | None
    ) -> dict[str, Any]:
        """What a kept result depends on besides samples and model."""
        source = inspect.getsourcefile(type(self))
        return {
            "method": f"{type(self).__module__}.{type(self).__qualname__}",
            "source": digest_file(Path(source)) if source and Path(source).is_file() else "",
            "params": {key: repr(value) for key, value in dataclasses.asdict(self).items()},  # type: ignore[call-overload]
            "weights": weights.model_dump() if weights else None,
            "activations": activations.model_dump() if activations else None,
            "linears": {name: [*linear.weight.shape, str(linear.weight.dtype)] for name, linear in linears.items()},
        }
