"""The `quantize` section of a spec, `QuantizeSpec`, and its `calibration`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from qapbench.errors import Problem, UserError
from qapbench.methods.kinds import ptqs
from qapbench.methods.kv import KVFormat
from qapbench.methods.quantization import Format, LinearFormats

from .backend import Backend, check_backend
from .items import PTQItem, created
from .overrides import Override, check_fitting, formats_of, or_mapping, parsed
from .strict import Strict, is_valid, named_item
from .text import NameOrPath

Scope = Literal["language", "projector", "vision"]
Storage = Literal["unpacked", "packed"]


class CalibrationSpec(Strict):
    """The samples that a method is calibrated on.

    Attributes:
        samples: number of questions, with and without images as the source has them.
        seed: decides which questions are taken, and their order.
        pruned: whether they pass through the spec's own pruner, so that ranges are measured on the tokens that it
            keeps.
        data: a parquet file of questions. None takes the task's own source, which contains no test questions.
        task: the task whose questions these are. None takes the run's own; one that has no questions for calibration
            needs another, and a run of several tasks is calibrated alike for all of them with one.
    """

    samples: Annotated[int, Field(ge=1, le=4096)] = 128
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    pruned: bool = False
    data: NameOrPath | None = None
    task: NameOrPath | None = None

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain data, in which a task that is not named is left out, as in versions that had no such field."""
        data = write(self)
        return data if self.task is not None else {key: value for key, value in data.items() if key != "task"}


class QuantizeSpec(Strict):
    """How the model is quantized.

    Attributes:
        method: the method.
        weights: format of the weights; None leaves them as they are. If both formats are None, the method's own are
            used, if it has any.
        activations: format of the activations; None leaves them as they are.
        scope: parts of the model whose linears are quantized.
        calibration: the samples; always None for a method that does not calibrate, whatever the spec file says.
        kv: format of the KV cache; None leaves it in the model's precision.
        storage: how quantized weights are held in memory. "unpacked" holds their values in the model's dtype. "packed"
            holds codes and scales, and computes the same values, to the bit, for each product.
        backend: "simulate" computes the values of a low-bit kernel in floating point. "torchao" runs real int8 kernels,
            which exist for one pair of formats.
        overrides: formats of some linears, by globs over their names, such as `{"*.down_proj": {weights: {bits: 8}}}`.
            What is not named is as in `weights` and `activations`; null in place of the formats leaves these linears in
            full precision. The first one that fits a linear counts.
    """

    method: PTQItem
    weights: Format | None = None
    activations: Format | None = None
    scope: list[Scope] = Field(default=["language"], min_length=1)
    calibration: CalibrationSpec | None = None
    backend: Backend = "simulate"
    kv: KVFormat | None = None
    storage: Storage = "unpacked"
    overrides: list[Override] = Field(default=[], json_schema_extra=or_mapping)

    @model_serializer(mode="wrap")
    def _without_later(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain data. What is not used of later versions' fields is left out, so that runs keep their ids."""
        data: dict[str, Any] = dump(self)
        if self.kv is None:
            data.pop("kv", None)
        if self.storage == "unpacked":
            data.pop("storage", None)
        if not self.overrides:
            data.pop("overrides", None)
        return data

    @field_validator("overrides", mode="before")
    @classmethod
    def _overridden(cls, given: Any, info: ValidationInfo) -> Any:
        """The overrides with complete formats. Without valid formats of the section, there is nothing to complete."""
        if given is None or not {"method", "weights", "activations"} <= info.data.keys():
            return []
        return parsed(given, {side: info.data[side] for side in ("weights", "activations")})

    @field_validator("scope")
    @classmethod
    def _set_of_parts(cls, scope: list[Scope]) -> list[Scope]:
        """Each part once, in a fixed order, so that equal scopes give equal runs."""
        return sorted(set(scope), key=get_args(Scope).index)

    @model_validator(mode="before")
    @classmethod
    def _by_method(cls, data: Any) -> Any:
        """Fill in formats and calibration that follow from the method."""
        method = named_item(ptqs, data, "method")
        if method is None:
            return data
        filled = dict(data)
        if filled.get("weights") is None and filled.get("activations") is None and method.formats is not None:
            filled |= dict(zip(("weights", "activations"), method.formats, strict=True))
        if not method.calibrates:
            # A section with mistakes stays, so that its validation reports them with all others.
            if is_valid(CalibrationSpec, filled.get("calibration")):
                filled["calibration"] = None
        elif filled.get("calibration") is None:
            filled["calibration"] = CalibrationSpec()
        return filled

    @model_validator(mode="after")
    def _formats_of_method(self) -> QuantizeSpec:
        own, several = (
            LinearFormats(self.weights, self.activations),
            [(one.weights, one.activations) for one in self.overrides],
        )
        if not any(map(any, (own, *several))) and self.kv is None:
            raise ValueError("give `weights`, `activations` or both; leave `quantize` out for full precision")
        method, problems = created(ptqs, self.method), list[Problem]()
        for where, (weights, activations) in [
            ((), own),
            *((("overrides", one.linears), pair) for one, pair in zip(self.overrides, several, strict=True)),
        ]:
            try:
                method.check(weights, activations)
                if not where or weights or activations:
                    check_backend(self.backend, weights, activations)
            except UserError as error:
                problems += [problem.under(*where) for problem in error.problems]
        if problems:
            raise UserError(problems)
        unquantized = not any(weights for weights, _ in (own, *several))
        if self.storage == "packed" and (unquantized or self.backend != "simulate"):
            reason = "no `weights` are quantized" if unquantized else f"{self.backend} stores its own weights"
            raise UserError(Problem(f"'packed' stores quantized weights, but {reason}; leave it out", ("storage",)))
        return self

    def formats_of(self, linear: str) -> LinearFormats:
        """The formats of a linear in scope.

        Args:
            linear: its name in the model.
        """
        return formats_of(self.overrides, LinearFormats(self.weights, self.activations), linear)

    def formats(self, linears: Collection[str]) -> dict[str, LinearFormats]:
        """The formats of all linears in scope.

        Args:
            linears: their names in the model.

        Raises:
            UserError: an override fits none of them, or never counts.
        """
        check_fitting(self.overrides, linears)
        return {name: self.formats_of(name) for name in linears}

    @property
    def label(self) -> str:
        """The quantization in words, such as "rtn W4A4"; 16 bits stand for no quantization."""
        w, a = (f.bits if f else 16 for f in (self.weights, self.activations))
        names = dict.fromkeys(f.format for f in (self.weights, self.activations) if f and f.format != "int")
        cache = [self.kv.label] if self.kv else []
        return " ".join([f"{self.method} W{w}A{a}", *names, *cache, *self._others])

    @property
    def _others(self) -> list[str]:
        """The overrides in words: each of up to two, or how many there are."""
        if len(self.overrides) > 2:
            return [f"({len(self.overrides)} overrides)"]
        return [f"({', '.join(one.label for one in self.overrides)})"] if self.overrides else []
