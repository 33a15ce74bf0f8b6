"""What to run, typed: `RunSpec`, one row of a table."""

from __future__ import annotations

import hashlib
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

from .backends import Backend, check_backend
from .errors import Problem, UserError
from .items import FusionItem, Item, MetricItem, PrunerItem, PTQItem
from .quantization import Format
from .registry import load_plugin_file, problems_of
from .strategy import DecoderPruner, fusions, pruners, ptqs

Scope = Literal["language", "projector", "vision"]


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

    @model_validator(mode="after")
    def _something(self) -> QuantizeSpec:
        if self.weights is None and self.activations is None:
            usual = ptqs.create(self.method.name, **self.method.params).formats
            if usual is not None:
                for side, format in zip(("weights", "activations"), usual, strict=True):
                    object.__setattr__(self, side, format)  # frozen to others
                return self
            raise ValueError("give `weights`, `activations` or both; leave `quantize` out for full precision")
        return self

    @model_validator(mode="after")
    def _formats_of_method(self) -> QuantizeSpec:
        method = ptqs.create(self.method.name, **self.method.params)
        method.check(self.weights, self.activations)
        check_backend(self.backend, self.weights, self.activations)
        wanted = (self.calibration or CalibrationSpec()) if method.calibrates else None
        object.__setattr__(self, "calibration", wanted)  # frozen to others
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
    def _default_fusion(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("sensitivity") is not None and data.get("fusion") is None:
            return {**data, "fusion": fusions.default}
        return data

    @model_validator(mode="after")
    def _fusion_of_something(self) -> PruneSpec:
        if self.fusion is not None and self.sensitivity is None:
            raise ValueError("`fusion` without `sensitivity`: name the sensitivity metric to fuse")
        return self

    @model_validator(mode="after")
    def _positions_of_the_method(self) -> PruneSpec:
        target = pruners.entry(self.method.name).target
        inside = isinstance(target, type) and issubclass(target, DecoderPruner)
        if inside and self.positions == "compact":
            raise ValueError(
                f"`positions: compact` cannot be had of {self.method}: it drops tokens inside the decoder, whose first "
                "layers have placed them already"
            )
        if self.positions is None:
            object.__setattr__(self, "positions", "keep" if inside else "compact")  # frozen to others
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

    @field_validator("plugins")
    @classmethod
    def _readable(cls, plugins: list[str]) -> list[str]:
        for plugin in plugins:
            load_plugin_file(plugin)
        return plugins

    @model_validator(mode="after")
    def _one_seed(self) -> RunSpec:
        """A pruner's own seed that is left at None is the run's."""
        if self.prune and "seed" in self.prune.method.params and self.prune.method.params["seed"] is None:
            method = Item(name=self.prune.method.name, params={**self.prune.method.params, "seed": self.seed})
            object.__setattr__(self, "prune", self.prune.model_copy(update={"method": method}))  # frozen to others
        return self

    @model_validator(mode="after")
    def _pruned_by_something(self) -> RunSpec:
        calibration = self.quantize.calibration if self.quantize else None
        if calibration and calibration.pruned and self.prune is None:
            raise UserError(Problem("`pruned: true` needs a `prune` section", ("quantize", "calibration", "pruned")))
        return self

    @classmethod
    def parse(cls, data: dict[str, Any]) -> RunSpec:
        """Validate; every mistake in one UserError."""
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
        text = json.dumps([fields, fingerprints], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
