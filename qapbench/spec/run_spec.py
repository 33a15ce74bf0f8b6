"""The spec of one run, `RunSpec`, and its sections."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

from qapbench.errors import Problem, UserError
from qapbench.hashing import digest_json
from qapbench.methods.kinds import fusions, pruners, ptqs
from qapbench.methods.kv import KVFormat
from qapbench.methods.parameters import problems_of
from qapbench.methods.plugins import load_plugin_files
from qapbench.methods.quantization import Format
from qapbench.methods.registry import Registry

from .backend import Backend, check_backend
from .cost_budget import CostBudget, or_cost
from .items import FusionItem, Item, MetricItem, PrunerItem, PTQItem, created, parse_item
from .model_name import ModelName
from .text import Data, NameOrPath

Scope = Literal["language", "projector", "vision"]
Storage = Literal["unpacked", "packed"]
WHITE = "#ffffff"


def _created(registry: Registry[Any], data: Any, field: str) -> Any:
    """The object that a field of plain data names; None if the field does not name a valid item.

    Args:
        registry: the registry that has the item.
        data: plain data of a section.
        field: name of the field.
    """
    if not isinstance(data, dict):
        return None
    try:
        return created(registry, parse_item(registry, data.get(field)))
    except UserError:
        return None  # the field's own validation reports the mistake


def _is_valid(model: type[BaseModel], data: Any) -> bool:
    """Whether a section has no mistakes, or is left out."""
    if data is None or isinstance(data, model):
        return True
    try:
        model.model_validate(data)
    except ValidationError:
        return False
    return True


class Strict(BaseModel):
    """Base of specs: unknown fields are refused, values are not converted, and instances are frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


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
    """

    method: PTQItem
    weights: Format | None = None
    activations: Format | None = None
    scope: Annotated[list[Scope], Field(min_length=1)] = ["language"]
    calibration: CalibrationSpec | None = None
    backend: Backend = "simulate"
    kv: KVFormat | None = None
    storage: Storage = "unpacked"

    @model_serializer(mode="wrap")
    def _without_later(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain data. What is not used of later versions' fields is left out, so that runs keep their ids."""
        data: dict[str, Any] = dump(self)
        if self.kv is None:
            data.pop("kv", None)
        if self.storage == "unpacked":
            data.pop("storage", None)
        return data

    @field_validator("scope")
    @classmethod
    def _set_of_parts(cls, scope: list[Scope]) -> list[Scope]:
        """Each part once, in a fixed order, so that equal scopes give equal runs."""
        return sorted(set(scope), key=get_args(Scope).index)

    @model_validator(mode="before")
    @classmethod
    def _by_method(cls, data: Any) -> Any:
        """Fill in formats and calibration that follow from the method."""
        method = _created(ptqs, data, "method")
        if method is None:
            return data
        filled = dict(data)
        if filled.get("weights") is None and filled.get("activations") is None and method.formats is not None:
            filled |= dict(zip(("weights", "activations"), method.formats, strict=True))
        if not method.calibrates:
            # A section with mistakes stays, so that its validation reports them with all others.
            if _is_valid(CalibrationSpec, filled.get("calibration")):
                filled["calibration"] = None
        elif filled.get("calibration") is None:
            filled["calibration"] = CalibrationSpec()
        return filled

    @model_validator(mode="after")
    def _formats_of_method(self) -> QuantizeSpec:
        if self.weights is None and self.activations is None and self.kv is None:
            raise ValueError("give `weights`, `activations` or both; leave `quantize` out for full precision")
        created(ptqs, self.method).check(self.weights, self.activations)
        check_backend(self.backend, self.weights, self.activations)
        if self.storage == "packed" and (self.weights is None or self.backend != "simulate"):
            reason = "no `weights` are quantized" if self.weights is None else f"{self.backend} stores its own weights"
            raise UserError(Problem(f"'packed' stores quantized weights, but {reason}; leave it out", ("storage",)))
        return self

    @property
    def label(self) -> str:
        """The quantization in words, such as "rtn W4A4"; 16 bits stand for no quantization."""
        w, a = (f.bits if f else 16 for f in (self.weights, self.activations))
        names = dict.fromkeys(f.format for f in (self.weights, self.activations) if f and f.format != "int")
        cache = [self.kv.label] if self.kv else []
        return " ".join([f"{self.method} W{w}A{a}", *names, *cache])


class PruneSpec(Strict):
    """Which visual tokens are kept.

    Attributes:
        method: the pruner.
        keep: the budget of tokens, counted as `per` says. An image or tile with fewer tokens keeps all of them. For a
            pruner inside the decoder, it is the number of tokens that layers after the last drop receive, or the mean
            over layers for a method that leaves none in the end. It may be given as a cost: `{layer_mean: 64}`, or
            `{flops: 0.2}` of the dense prefill, or `{kv_bytes: 50000000}`; `qapbench.costing.budget` finds the number.
        sensitivity: metric whose scores are fused with the pruner's relevance. None lets the pruner select by relevance
            alone.
        fusion: how both scores are combined; the default fusion if there is a sensitivity and this is None.
        per: what `keep` counts if the model cuts images into tiles: tokens of each tile ("tile"), or of all tiles of an
            image together ("image").
        positions: "compact" numbers the shortened sequence anew. "keep" leaves every token its original position, which
            is all that pruners inside the decoder can do. One that shortens the prompt first may number that prompt
            anew. None becomes "keep" for pruners inside the decoder alone and "compact" for all others.
        budget: the cost that a spec gives under `keep`; `keep` then says nothing until it is resolved. None if the spec
            gives a number of tokens.
    """

    method: PrunerItem
    keep: Annotated[int, Field(ge=1, json_schema_extra=or_cost)]
    sensitivity: MetricItem | None = None
    fusion: FusionItem | None = None
    per: Literal["tile", "image"] = "tile"
    positions: Literal["compact", "keep"] | None = None
    budget: SkipJsonSchema[CostBudget | None] = None

    @model_validator(mode="before")
    @classmethod
    def _by_method(cls, data: Any) -> Any:
        """Fill in the default fusion and the default positions, and take a cost for what it is."""
        if not isinstance(data, dict):
            return data
        if "budget" in data:
            raise UserError(Problem("unknown field; a cost stands under `keep`", ("budget",)))
        filled = dict(data)
        if isinstance(data.get("keep"), dict):
            try:
                filled |= {"budget": CostBudget.model_validate(data["keep"]), "keep": 1}
            except ValidationError as error:
                raise UserError([one.under("keep") for one in problems_of(error, CostBudget)]) from None
        if filled.get("sensitivity") is not None and filled.get("fusion") is None:
            filled["fusion"] = fusions.default
        method = _created(pruners, data, "method")
        if method is not None and filled.get("positions") is None:
            filled["positions"] = "keep" if method.front is None else "compact"
        return filled

    @model_serializer(mode="wrap")
    def _as_written(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain data, with a cost under `keep`, where the spec has it."""
        data: dict[str, Any] = dump(self)
        data.pop("budget", None)
        return data | {"keep": self.budget.given} if self.budget else data

    @model_validator(mode="after")
    def _consistent(self) -> PruneSpec:
        if self.fusion is not None and self.sensitivity is None:
            raise ValueError("`fusion` without `sensitivity`: name the sensitivity metric to fuse")
        if self.positions == "compact" and created(pruners, self.method).front is None:
            raise ValueError(
                f"`positions: compact` cannot be had of {self.method}: it drops tokens inside the decoder, whose first "
                "layers have placed them already"
            )
        return self

    @property
    def label(self) -> str:
        """The pruning in words: method, budget and sensitivity."""
        return f"{self.method} {self.budget or self.keep}" + (f" + {self.sensitivity}" if self.sensitivity else "")


def _colour(value: str) -> str:
    """A colour as `#rrggbb`, so that equal colours give equal runs."""
    if not re.fullmatch(r"white|#[0-9A-Fa-f]{6}", value):
        raise ValueError(f"a colour is 'white' or '#rrggbb', got {value!r}")
    return WHITE if value == "white" else value.lower()


class TaskSpec(Strict):
    """The task that is asked.

    Attributes:
        name: a task of this project, any task of lm-eval's, or the path of an lm-eval YAML file (.yaml or .yml).
        origin: `from` in a spec. "lmms-eval" looks the name up among the tasks of lmms-eval.
        include_path: folder of the user's own lm-eval YAML files, in which the name is looked up; None looks it up
            among the tasks of this project and lm-eval's.
        data: a parquet file, or a hub id; None takes the task's own data. Of a task of lmms-eval's: a folder, or a
            mapping from hub ids to folders or parquet files, where everything that the task loads is found.
        limit: number of questions, taken from the front; None asks all.
        prompt: name of a prompt that the task knows; None takes its default.
        parser: name of a parser that the task knows; None takes its default.
        answers: "letter" takes the most likely option letter from one prefill; "generate" generates text and parses it.
        metric: name of the task's metric that is its score; None takes the overall one of a task of this project, and
            the first one of any other.
        background: colour that transparent pixels of images are put on, "white" or "#rrggbb" (in quotes, since YAML
            takes what follows a # for a comment). None gives them the colour that is stored below them, as LLaVA's code
            does.
        blank_images: ask with grey images in the place of the questions' own, to see what can be answered without.
    """

    name: NameOrPath
    origin: Annotated[Literal["lmms-eval"] | None, Field(alias="from")] = None  # `from` is a word of Python's
    include_path: NameOrPath | None = None
    data: Data | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    prompt: NameOrPath | None = None
    parser: NameOrPath | None = None
    answers: Literal["letter", "generate"] = "letter"
    metric: NameOrPath | None = None
    background: Annotated[str, AfterValidator(_colour)] | None = None
    blank_images: bool = False

    @property
    def names_file(self) -> bool:
        """Whether the name is the path of a YAML file."""
        return self.name.lower().endswith((".yaml", ".yml"))

    @property
    def names_own_file(self) -> bool:
        """Whether the task is an lm-eval YAML file of the user's, named by its path or by its name in a folder."""
        return self.names_file or self.include_path is not None

    @model_validator(mode="after")
    def _found_in_one_place(self) -> TaskSpec:
        if self.names_file and self.include_path is not None:
            raise ValueError(f"`include_path` is for a task's name, and '{self.name}' is a file; leave one of them out")
        if self.origin and self.names_own_file:
            raise ValueError("`from` is for the name of a task of lmms-eval's; leave it out for a file of your own")
        if isinstance(self.data, dict) and not self.origin:
            message = "a mapping from hub ids to folders is for `from: lmms-eval`; name one file, or a hub id"
            raise UserError(Problem(message, ("data",)))
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """`from` under the name that it has in a spec, and only if it is given: earlier versions had no such field."""
        fields = plain(self)
        origin = fields.pop("origin", None)
        return {**fields, "from": origin} if origin else fields


def _in_the_list(problems: list[Problem]) -> list[Problem]:
    """The problems of a spec; those of one task in a list are told once, at its place in the list."""
    listed = [problem for problem in problems if problem.where[:1] == ("tasks",) and len(problem.where) > 1]
    if not listed:
        return problems
    others = [problem for problem in problems if problem not in listed and problem.where[:1] != ("task",)]
    return [*others, *(replace(problem, where=("task", *problem.where[1:])) for problem in listed)]


class RunSpec(Strict):
    """One run: a model, compressed in one way, on one task or several.

    Attributes:
        name: a label. It does not enter the run's id.
        plugins: Python files that register strategies.
        model: name of an embedded model, a checkpoint folder, or a hub id. An embedded model that has settings takes
            them as `{name: NAME, setting: value}`.
        dtype: dtype of the weights. "auto" is the checkpoint's own on a GPU, and float32 on a CPU.
        text_tower: CLIP checkpoint whose joint embedding space gives relevance; None takes the model family's default.
        task: the task; in a spec file it may be a list of tasks.
        quantize: the quantization; None for full precision.
        prune: the pruning; None keeps all tokens.
        seed: seed of everything random, unless a section has its own.
        tasks: all tasks of a spec whose `task` is a list; `task` is then the first one. Empty if it is one task.
        strata: parts of the questions whose scores are shown apart. "needs_image" are those with an image that the
            full-precision model, with nothing pruned, answers wrongly when the image is blank. It is asked that once
            per model and task. The run itself does not depend on it.
    """

    name: str = "run"
    plugins: list[NameOrPath] = []  # loaded by `parse`, before what they register is validated
    model: ModelName
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    text_tower: NameOrPath | None = None
    task: TaskSpec
    quantize: QuantizeSpec | None = None
    prune: PruneSpec | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    tasks: Annotated[list[TaskSpec], Field(exclude=True)] = []
    strata: Annotated[list[Literal["needs_image"]], Field(exclude=True)] = []

    @model_validator(mode="before")
    @classmethod
    def _task_by_name(cls, data: Any) -> Any:
        """Accept `task: NAME` for `task: {name: NAME}`, and a list of either."""
        if not isinstance(data, dict):
            return data
        if isinstance(data.get("strata"), str):
            data = {**data, "strata": [data["strata"]]}
        task = data.get("task")
        if "tasks" in data:
            raise UserError(Problem("unknown field; a list of tasks stands under `task`", ("tasks",)))
        if isinstance(task, list):
            if not task:
                raise UserError(Problem("an empty list; name at least one task", ("task",)))
            listed = [{"name": one} if isinstance(one, str) else one for one in task]
            return {**data, "task": listed[0], "tasks": listed}
        return {**data, "task": {"name": task}} if isinstance(task, str) else data

    @model_validator(mode="before")
    @classmethod
    def _one_seed(cls, data: Any) -> Any:
        """Give the pruner the run's seed if its own seed is None."""
        prune = data.get("prune") if isinstance(data, dict) else None
        seed = data.get("seed", 0) if isinstance(data, dict) else None
        if not isinstance(prune, dict | PruneSpec) or isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            return data  # nothing to seed, or the field's own validation reports the mistake
        try:
            method = prune.method if isinstance(prune, PruneSpec) else parse_item(pruners, prune.get("method"))
        except UserError:
            return data  # the field's own validation reports the mistake
        if "seed" not in method.params or method.params["seed"] is not None:
            return data
        update = {"method": Item(name=method.name, params={**method.params, "seed": seed})}
        seeded = prune.model_copy(update=update) if isinstance(prune, PruneSpec) else {**prune, **update}
        return {**data, "prune": seeded}

    @model_validator(mode="after")
    def _pruned_by_something(self) -> RunSpec:
        calibration = self.quantize.calibration if self.quantize else None
        if calibration and calibration.pruned and self.prune is None:
            raise UserError(Problem("`pruned: true` needs a `prune` section", ("quantize", "calibration", "pruned")))
        return self

    @classmethod
    def parse(cls, data: dict[str, Any]) -> RunSpec:
        """Load the plugins that a spec names, and validate it.

        Args:
            data: plain data of a spec.

        Raises:
            UserError: the spec has mistakes; all of them are listed.
        """
        problems = load_plugin_files(data.get("plugins")) if isinstance(data, dict) else []
        try:
            spec = cls.validated(data)
        except UserError as error:
            raise UserError([*problems, *error.problems]) from None
        if problems:
            raise UserError(problems)
        return spec

    @classmethod
    def validated(cls, data: dict[str, Any]) -> RunSpec:
        """Validate a spec whose plugins are loaded.

        Args:
            data: plain data of a spec.

        Raises:
            UserError: the spec has mistakes; all of them are listed.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(_in_the_list(problems_of(error, cls))) from None

    def one_by_one(self, tasks: Sequence[TaskSpec]) -> list[RunSpec]:
        """The runs that a run of several tasks consists of: one for each, under the names that tell them apart.

        Args:
            tasks: the tasks.
        """
        if len(tasks) == 1:
            return [self.model_copy(update={"task": tasks[0], "tasks": []})]
        return [
            self.model_copy(update={"name": f"{self.name}, {task.name}", "task": task, "tasks": []}) for task in tasks
        ]

    def calibrating(self) -> RunSpec:
        """The run with the task whose questions calibrate it in the place of its own."""
        wanted = self.quantize.calibration if self.quantize else None
        if wanted is None or wanted.task is None:
            return self
        return self.model_copy(update={"task": TaskSpec(name=wanted.task), "tasks": []})

    def without_images(self) -> RunSpec:
        """The run that finds out which questions of the task need their image: nothing compressed, images blank."""
        task = self.task.model_copy(update={"blank_images": True})
        update = {"name": f"blank images, {task.name}", "task": task, "quantize": None, "prune": None, "strata": []}
        return self.model_copy(update=update | {"plugins": [], "text_tower": None})

    def canonical(self) -> str:
        """JSON that is equal for equal runs: defaults are filled in, keys are sorted, the label is left out."""
        return json.dumps(self.model_dump(mode="json", exclude={"name"}), sort_keys=True)

    def digest(self, fingerprints: dict[str, str], task: dict[str, Any] | None = None) -> str:
        """Id of the run: a hash of how it compresses and asks, and of the content that it reads.

        Args:
            fingerprints: content hashes of the model, the data, the plugins and so on. They replace names and paths, so
                that a file that was moved keeps its results and a file that changed does not.
            task: options of the task with its own defaults filled in; None hashes them as they are written.
        """
        fields = self.model_dump(mode="json", exclude={"name", "model", "text_tower", "plugins", "dtype"})
        for path in ("data", "include_path"):
            fields["task"].pop(path)
        if fields["quantize"] and fields["quantize"]["calibration"]:
            fields["quantize"]["calibration"].pop("data")
        for later in ("metric", "background", "blank_images"):
            if not fields["task"][later]:  # as in versions that had no such field
                fields["task"].pop(later)
        fields["task"] |= task or {}
        return digest_json([fields, fingerprints])
