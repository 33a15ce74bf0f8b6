"""The spec of one run, `RunSpec`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationError,
    model_validator,
)

from qapbench.errors import Problem, UserError
from qapbench.hashing import digest_json
from qapbench.methods.formats import Format
from qapbench.methods.kinds import pruners
from qapbench.methods.parameters import problems_of
from qapbench.methods.plugins import load_plugin_files

from .items import Item, parse_item
from .model_name import ModelName
from .prune_spec import PruneSpec
from .quantize_spec import CalibrationSpec, QuantizeSpec
from .strict import Strict
from .task_spec import TaskSpec
from .text import NameOrPath

__all__ = ["CalibrationSpec", "PruneSpec", "QuantizeSpec", "RunSpec", "Strict"]


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
    plugins: list[NameOrPath] = Field(default=[])  # loaded by `parse`, before what they register is validated
    model: ModelName
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    text_tower: NameOrPath | None = None
    task: TaskSpec
    quantize: QuantizeSpec | None = None
    prune: PruneSpec | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    tasks: list[TaskSpec] = Field(default=[], exclude=True)
    strata: list[Literal["needs_image"]] = Field(default=[], exclude=True)

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

    @property
    def packs(self) -> bool:
        """Whether quantized weights are stored packed."""
        return self.quantize is not None and self.quantize.storage == "packed"

    def quantizes(self, part: str) -> bool:
        """Whether linears of a part of the model are quantized."""
        return self.quantize is not None and part in self.quantize.scope

    def weights_of(self, part: str) -> Format | None:
        """The format of the weights of a part's linears, unless it is overridden; None if they are not quantized."""
        return self.quantize.weights if self.quantize is not None and self.quantizes(part) else None

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
