"""Interface of post-training quantization methods: the base class `PTQ`."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from torch import nn

from qapbench.errors import Problem, UserError

from .floating import FormatName
from .formats import Format, Granularity, LinearFormats, by_formats
from .plans import LinearPlan


class PTQ(abc.ABC):
    """A post-training quantization method.

    Subclasses are frozen dataclasses whose fields are the parameters that a spec can set.

    Attributes:
        calibrates: whether the method needs calibration samples. Such methods derive from `CalibratedPTQ`.
        formats: (weights, activations) used if a spec states neither; None if a spec must state them.
        weight_formats: names of formats of weights that `check` accepts.
        weight_granularities: granularities of weights that `check` accepts.
        activation_granularities: granularities of activations that `check` accepts.
    """

    calibrates: ClassVar[bool] = False
    formats: ClassVar[tuple[Format | None, Format | None] | None] = None
    weight_formats: ClassVar[tuple[FormatName, ...]] = get_args(FormatName)
    weight_granularities: ClassVar[tuple[Granularity, ...]] = ("row",)
    activation_granularities: ClassVar[tuple[Granularity, ...]] = ("row", "tensor")

    @property
    def used_metrics(self) -> tuple[str, ...]:
        """Names of registered metrics that the method computes. Their code counts for the identity of its results."""
        return ()

    def online_flops(self, name: str, inward: int, outward: int, of_norm: bool) -> int:
        """FLOPs per token of the transforms that a linear needs while the model runs; its cost counts them.

        A transform that can be folded into the weights in front of the linear is none of them.

        Args:
            name: name of the linear.
            inward: width of the linear's input.
            outward: width of its output.
            of_norm: whether it reads what a norm gives, and so the residual stream.
        """
        return 0

    def check(self, weights: Format | None, activations: Format | None) -> None:
        """Check that the method supports these formats.

        Raises:
            UserError: it does not. The message names the field of the spec's `quantize` section.
        """
        sides = {
            "weights": (weights, self.weight_granularities),
            "activations": (activations, self.activation_granularities),
        }
        for side, (format, supported) in sides.items():
            if format is not None and format.granularity not in supported:
                message = f"this method makes {' or '.join(supported)}, not '{format.granularity}'"
                raise UserError(Problem(message, (side, "granularity")))
        if weights is not None and weights.format not in self.weight_formats:
            message = f"this method makes {' or '.join(self.weight_formats)}, not '{weights.format}'"
            raise UserError(Problem(message, ("weights", "format")))

    @abc.abstractmethod
    def prepare(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
        calibration: Any = None,
    ) -> dict[str, LinearPlan]:
        """Make a plan for every linear in scope.

        Args:
            model: the loaded model, which must not be changed.
            linears: the linears in scope, by their name in the model.
            weights: the format asked for; None leaves weights in the model's precision.
            activations: the format asked for; None leaves activations in the model's precision.
            calibration: samples, for methods that need them: a `Calibration`, `CalibrationSamples`, or a sequence of
                the model's inputs.

        Returns:
            One plan per linear. The receipt reports a linear without a plan as a fallback.
        """

    def prepare_each(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        formats: Mapping[str, LinearFormats],
        calibration: Any = None,
    ) -> dict[str, LinearPlan]:
        """Make a plan for every linear in scope, in formats of its own.

        Args:
            model: the loaded model, which must not be changed.
            linears: the linears in scope, by their name in the model.
            formats: the formats of each of them. If they differ, a linear without any is none that the method sees.
            calibration: as in `prepare`.

        Returns:
            One plan per linear, as `prepare`; none for a linear that the method does not see.
        """
        pairs = set(formats.values())
        if len(pairs) < 2:
            weights, activations = next(iter(pairs), LinearFormats(None, None))
            return self.prepare(model, linears, weights, activations, calibration)
        asked = {name: linear for name, linear in linears.items() if any(formats[name])}
        return self._prepare_several(model, asked, formats, calibration)

    def _prepare_several(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        formats: Mapping[str, LinearFormats],
        calibration: Any,
    ) -> dict[str, LinearPlan]:
        """The plans of linears in formats that may differ: those of each pair of formats by themselves."""
        found: dict[str, LinearPlan] = {}
        for pair, names in by_formats(linears, formats).items():
            found |= self.prepare(model, {name: linears[name] for name in names}, *pair, calibration)
        return {name: found[name] for name in linears if name in found}
