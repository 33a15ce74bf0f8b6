"""The `quantize` section of a spec, `QuantizeSpec`, and its `calibration`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
from qapbench.methods.formats import Format, LinearFormats
from qapbench.methods.kinds import ptqs
from qapbench.methods.kv import KVFormat

from .allocate_spec import AllocateSpec, or_name
from .backend import Backend, check_backend
from .items import PTQItem, created, named_item
from .overrides import Override, check_fitting, formats_of, or_mapping, parsed
from .strict import Strict, is_valid
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
        allocate: gives each layer weights of as many bits as it needs, measured on the calibration samples, so that
            the mean is kept. Linears that an override fits are left out. Write the name of a method, or its settings.
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
    allocate: Annotated[AllocateSpec | None, Field(json_schema_extra=or_name)] = None

    @model_serializer(mode="wrap")
    def _without_later(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain data. What is not used of later versions' fields is left out, so that runs keep their ids."""
        data: dict[str, Any] = dump(self)
        if self.kv is None:
            data.pop("kv", None)
        if self.storage == "unpacked":
            data.pop("storage", None)
        for name in ("overrides", "allocate"):
            if not getattr(self, name):
                data.pop(name, None)
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
        if not method.calibrates and filled.get("allocate") is None:
            # A section with mistakes stays, so that its validation reports them with all others.
            if is_valid(CalibrationSpec, filled.get("calibration")):
                filled["calibration"] = None
        elif filled.get("calibration") is None:
            filled["calibration"] = CalibrationSpec()
        return filled

    @model_validator(mode="after")
    def _formats_of_method(self) -> QuantizeSpec:
        asked = [((), LinearFormats(self.weights, self.activations)), *self._asked_of_some()]
        if not any(any(pair) for _, pair in asked) and self.kv is None:
            raise ValueError("give `weights`, `activations` or both; leave `quantize` out for full precision")
        method, problems = created(ptqs, self.method), list[Problem]()
        for where, (weights, activations) in asked:
            try:
                method.check(weights, activations)
                if not where or weights or activations:
                    check_backend(self.backend, weights, activations)
            except UserError as error:
                told = [problem.under(*where) for problem in error.problems]
                problems += [problem for problem in told if problem not in problems]
        unquantized = not any(pair.weights for _, pair in asked)
        if self.storage == "packed" and (unquantized or self.backend != "simulate"):
            reason = "no `weights` are quantized" if unquantized else f"{self.backend} stores its own weights"
            problems.append(Problem(f"'packed' stores quantized weights, but {reason}; leave it out", ("storage",)))
        if problems:
            raise UserError(problems)
        return self

    def _asked_of_some(self) -> list[tuple[tuple[str, ...], LinearFormats]]:
        """The formats that some linears have or may get, each with the place in the section that says so.

        Raises:
            UserError: bits cannot be allocated to these weights.
        """
        found: list[tuple[tuple[str, ...], LinearFormats]] = [
            (("overrides", one.linears), LinearFormats(one.weights, one.activations)) for one in self.overrides
        ]
        if self.allocate is None:
            return found
        if self.weights is None or self.weights.format != "int":
            what = "weights that are not quantized" if self.weights is None else f"{self.weights.format} weights"
            raise UserError(Problem(f"{what} have no bits to choose; give `weights: {{bits: 4}}`", ("allocate",)))
        if self.mean_bits < self.allocate.choices[0]:
            message = f"a mean of {self.mean_bits:g} is less than the fewest of the choices, {self.allocate.choices[0]}"
            raise UserError(Problem(message, ("allocate", "bits" if self.allocate.bits else "choices")))
        return [*found, *((("allocate", "choices"), self.formats_with(bits)) for bits in self.allocate.choices)]

    @property
    def mean_bits(self) -> float:
        """Bits per weight that `allocate` may reach; those of `weights` without it, and 16 for none."""
        own = 16 if self.weights is None else self.weights.bits
        return own if self.allocate is None or self.allocate.bits is None else self.allocate.bits

    def formats_with(self, bits: float) -> LinearFormats:
        """The formats of a linear whose weights are allocated so many bits, which may be a mean."""
        weights = None if self.weights is None else self.weights.model_copy(update={"bits": bits})
        return LinearFormats(weights, self.activations)

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

    def with_allocated(self, bits: Mapping[str, int]) -> QuantizeSpec:
        """The section with what was allocated written as overrides.

        Args:
            bits: bits of the weights by glob over linears.
        """
        chosen = [(glob, self.formats_with(each)) for glob, each in bits.items()]
        new = [Override(linears=glob, weights=pair.weights, activations=pair.activations) for glob, pair in chosen]
        return self.model_copy(update={"allocate": None, "overrides": [*self.overrides, *new]})

    @property
    def label(self) -> str:
        """The quantization in words, such as "rtn W4A4"; 16 bits stand for no quantization."""
        w, a = (f.bits if f else 16 for f in (self.weights, self.activations))
        names = dict.fromkeys(f.format for f in (self.weights, self.activations) if f and f.format != "int")
        cache = [self.kv.label] if self.kv else []
        return " ".join([f"{self.method} W{w}A{a}", *names, *cache, *self._others])

    @property
    def _others(self) -> list[str]:
        """The overrides in words, each of up to two or how many there are, and what is allocated."""
        chosen = [f"(mean {self.mean_bits:g} bits by {self.allocate.method})"] if self.allocate else []
        if len(self.overrides) > 2:
            return [f"({len(self.overrides)} overrides)", *chosen]
        return [*([f"({', '.join(one.label for one in self.overrides)})"] if self.overrides else []), *chosen]
