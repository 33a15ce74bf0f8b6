"""What to run, typed: `RunSpec`, one row of a table."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from qapbench.errors import Problem, UserError
from qapbench.hashing import digest_json
from qapbench.methods.kinds import DecoderPruner, fusions, pruners, ptqs
from qapbench.methods.parameters import problems_of
from qapbench.methods.plugins import load_plugin_files
from qapbench.methods.quantization import Format
from qapbench.methods.registry import Registry

from .backend import Backend, check_backend
from .items import FusionItem, Item, MetricItem, PrunerItem, PTQItem, created, parse_item

Scope = Literal["language", "projector", "vision"]


def _created(registry: Registry[Any], data: Any, field: str) -> Any:
    """The usable item that a field of plain data names; None where it names none that is valid."""
    if not isinstance(data, dict):
        return None
    try:
        return created(registry, parse_item(registry, data.get(field)))
    except UserError:
        return None  # the field's own validation says so


def _checked(model: type[BaseModel], data: Any, field: str) -> None:
    """Raise UserError for mistakes in a section that is not going to be used."""
    try:
        if isinstance(data, dict):
            model.model_validate(data)
    except ValidationError as error:
        raise UserError([problem.under(field) for problem in problems_of(error, model)]) from None


class Strict(BaseModel):
    """Nothing unknown, nothing coerced, nothing changed after the fact."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class CalibrationSpec(Strict):
    """What a calibrating method looks at.

    Attributes:
        samples: questions, with and without images as the source has them.
        seed: which of them, and in which order.
        pruned: they go through the spec's own pruner, so that ranges are those of the tokens that stay.
        data: a parquet file of questions; where None the task's own source, which has none of the test questions.
    """

    samples: Annotated[int, Field(ge=1, le=4096)] = 128
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    pruned: bool = False
    data: str | None = None


class QuantizeSpec(Strict):
    """How the model is quantized.

    Attributes:
        weights, activations: their formats; a method that is defined for one pair only needs neither.
        scope: the parts whose linears are.
        calibration: for methods that calibrate; None for others, whatever is written.
        backend: "simulate" computes in the model's own precision what a low-bit kernel would answer; "torchao" runs
            real int8 kernels, where both formats are what they compute.
    """

    method: PTQItem
    weights: Format | None = None
    activations: Format | None = None
    scope: Annotated[list[Scope], Field(min_length=1)] = ["language"]
    calibration: CalibrationSpec | None = None
    backend: Backend = "simulate"

    @field_validator("scope")
    @classmethod
    def _set_of_parts(cls, scope: list[Scope]) -> list[Scope]:
        """Each part once, in one order, so that equal scopes give equal runs."""
        return sorted(set(scope), key=get_args(Scope).index)

    @model_validator(mode="before")
    @classmethod
    def _by_method(cls, data: Any) -> Any:
        """Fill in the formats and the calibration that the method itself decides."""
        method = _created(ptqs, data, "method")
        if method is None:
            return data
        filled = dict(data)
        if filled.get("weights") is None and filled.get("activations") is None and method.formats is not None:
            filled |= dict(zip(("weights", "activations"), method.formats, strict=True))
        if not method.calibrates:
            _checked(CalibrationSpec, filled.get("calibration"), "calibration")
            filled["calibration"] = None
        elif filled.get("calibration") is None:
            filled["calibration"] = CalibrationSpec()
        return filled

    @model_validator(mode="after")
    def _formats_of_method(self) -> QuantizeSpec:
        if self.weights is None and self.activations is None:
            raise ValueError("give `weights`, `activations` or both; leave `quantize` out for full precision")
        created(ptqs, self.method).check(self.weights, self.activations)
        check_backend(self.backend, self.weights, self.activations)
        return self

    @property
    def label(self) -> str:
        w, a = (f.bits if f else 16 for f in (self.weights, self.activations))
        return f"{self.method} W{w}A{a}"


class PruneSpec(Strict):
    """Which visual tokens are kept. Without `sensitivity` the pruner chooses by meaning alone.

    `keep` counts tokens per image or, where a model cuts its images into tiles, per tile ("tile") or of all tiles of
    an image together ("image"). An image or tile that has fewer keeps them all. Of pruners inside the decoder it is
    what the layers behind the last drop see.
    `positions`: "compact" numbers the shortened sequence anew; "keep" leaves every token its original position, which
    is all that pruners inside the decoder can do. None is the method's own: "keep" inside, else "compact".
    """

    method: PrunerItem
    keep: Annotated[int, Field(ge=1)]
    sensitivity: MetricItem | None = None
    fusion: FusionItem | None = None
    per: Literal["tile", "image"] = "tile"
    positions: Literal["compact", "keep"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_method(cls, data: Any) -> Any:
        """Fill in the fusion and the positions that are usual for what is asked."""
        if not isinstance(data, dict):
            return data
        filled = dict(data)
        if filled.get("sensitivity") is not None and filled.get("fusion") is None:
            filled["fusion"] = fusions.default
        method = _created(pruners, data, "method")
        if method is not None and filled.get("positions") is None:
            filled["positions"] = "keep" if isinstance(method, DecoderPruner) else "compact"
        return filled

    @model_validator(mode="after")
    def _consistent(self) -> PruneSpec:
        if self.fusion is not None and self.sensitivity is None:
            raise ValueError("`fusion` without `sensitivity`: name the sensitivity metric to fuse")
        if self.positions == "compact" and isinstance(created(pruners, self.method), DecoderPruner):
            raise ValueError(
                f"`positions: compact` cannot be had of {self.method}: it drops tokens inside the decoder, whose first "
                "layers have placed them already"
            )
        return self

    @property
    def label(self) -> str:
        return f"{self.method} {self.keep}" + (f" + {self.sensitivity}" if self.sensitivity else "")


class TaskSpec(Strict):
    """What is asked.

    Attributes:
        name: a task of this project, or any lm-eval task.
        data: a parquet file, or a hub id; the task's own default where None.
        limit: only the first questions.
        prompt, parser: names that the task knows; its own defaults where None.
        answers: "letter" takes the most likely option letter from one prefill; "generate" decodes text and parses it.
    """

    name: str
    data: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    prompt: str | None = None
    parser: str | None = None
    answers: Literal["letter", "generate"] = "letter"


class RunSpec(Strict):
    """One run: a model, compressed in one way, on one task.

    Attributes:
        name: a label; it does not enter the run's id.
        model: an embedded name, a checkpoint folder, or a hub id.
        dtype: of the weights as loaded; "auto" is the checkpoint's own on a GPU and float32 on a CPU.
        text_tower: CLIP checkpoint whose joint space gives relevance; the model family's default where None.
        plugins: Python files that register strategies.
    """

    name: str = "run"
    plugins: list[str] = []  # before the fields whose names they register
    model: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    text_tower: str | None = None
    task: TaskSpec
    quantize: QuantizeSpec | None = None
    prune: PruneSpec | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="before")
    @classmethod
    def _task_by_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("task"), str):
            return {**data, "task": {"name": data["task"]}}
        return data

    @model_validator(mode="before")
    @classmethod
    def _one_seed(cls, data: Any) -> Any:
        """A pruner's own seed that is left at None becomes the run's."""
        prune = data.get("prune") if isinstance(data, dict) else None
        if not isinstance(prune, dict):
            return data
        try:
            method = parse_item(pruners, prune.get("method"))
        except UserError:
            return data  # the field's own validation says so
        if "seed" not in method.params or method.params["seed"] is not None:
            return data
        seeded = Item(name=method.name, params={**method.params, "seed": data.get("seed", 0)})
        return {**data, "prune": {**prune, "method": seeded}}

    @model_validator(mode="after")
    def _pruned_by_something(self) -> RunSpec:
        calibration = self.quantize.calibration if self.quantize else None
        if calibration and calibration.pruned and self.prune is None:
            raise UserError(Problem("`pruned: true` needs a `prune` section", ("quantize", "calibration", "pruned")))
        return self

    @classmethod
    def parse(cls, data: dict[str, Any]) -> RunSpec:
        """Load the plugins that the spec names, validate, and report every mistake in one UserError."""
        problems = load_plugin_files(data.get("plugins")) if isinstance(data, dict) else []
        if problems:
            raise UserError(problems)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(problems_of(error, cls)) from None

    def canonical(self) -> str:
        """JSON that is equal for equal runs: defaults filled in, keys sorted, the label left out."""
        return json.dumps(self.model_dump(mode="json", exclude={"name"}), sort_keys=True)

    def digest(self, fingerprints: dict[str, str], task: dict[str, Any] | None = None) -> str:
        """Id of the run: how it compresses and asks, and the content of what it reads.

        Args:
            fingerprints: content hashes of the model, the data, the plugins; they stand for the names and paths
                of these, so that a moved file keeps its results and a changed one does not.
            task: what the task's fields come to, once its own defaults are filled in; as written where None.
        """
        fields = self.model_dump(mode="json", exclude={"name", "model", "text_tower", "plugins", "dtype"})
        fields["task"].pop("data")
        if fields["quantize"] and fields["quantize"]["calibration"]:
            fields["quantize"]["calibration"].pop("data")
        fields["task"] |= task or {}
        return digest_json([fields, fingerprints])
