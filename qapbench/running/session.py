"""Holds the loaded model and what belongs to it. Each worker process has a session of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qapbench.checkpoints.find import find_checkpoint
from qapbench.compression import compress
from qapbench.costing.budget import resolved
from qapbench.costing.known import costed_model
from qapbench.hashing import state_of_tree
from qapbench.memory import Phases, free_bytes, give_back_freed
from qapbench.models import family_of
from qapbench.models.loading import load_model, load_processor, may_leave, precision, read_config
from qapbench.models.placement import USABLE
from qapbench.models.unread import any_unread, read_some
from qapbench.progress import ProgressCallback, silent
from qapbench.prune.build import build_pruning
from qapbench.prune.prompt import PruningView
from qapbench.prune.pruning import Pruning
from qapbench.quantize.calibration import CalibrationSamples
from qapbench.quantize.originals import Keep
from qapbench.receipt import Receipt
from qapbench.spec.run_spec import RunSpec
from qapbench.tasking import calibration_samples
from qapbench.tasking.tasks import LoadedTask, load_task

from .estimate import refuse_unless_it_fits
from .plan import Planned
from .settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from qapbench.tasking.questions import Question

CALIBRATIONS = "calibrations"  # name of their folder, beside those of the runs
LARGE = 2**30  # bytes of weights from which memory that is left behind counts


def _bytes(folder: Path) -> int:
    """Size of the weights of a checkpoint."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


class Session:
    """Loads models, tasks, questions and calibration samples as runs need them.

    The latest model, questions and samples stay loaded, and all tasks.

    Args:
        settings: where and how runs are made.
        progress: called with (name, done, total).

    Attributes:
        keep_originals: where original weights are while the model is quantized; see `compress`. A model that the
            session loads needs no copy of them: they are read again from its checkpoint.
        phases: peak memory of loading, quantizing and answering.
    """

    def __init__(self, settings: Settings, progress: ProgressCallback = silent) -> None:
        self.settings = settings
        self.progress = progress
        self.phases = Phases(*settings.held_on)
        self.keep_originals: Keep = "checkpoint"
        self._loaded: tuple[Hashable, Any, Any] | None = None
        self._reserve: dict[torch.device, int] = {}  # bytes that weights leave free where some may stay in files
        self._tasks: dict[Hashable, LoadedTask] = {}
        self._questions: dict[Hashable, list[Question]] = {}
        self._samples: dict[Hashable, CalibrationSamples] = {}

    def model(self, spec: RunSpec) -> tuple[Any, Any]:
        """The model of a run in full precision, and its processor.

        Raises:
            UserError: the checkpoint cannot be loaded, or its weights do not fit into the memory that is free.
        """
        key = self._model_key(spec)
        if self._loaded is None or self._loaded[0] != key:
            held, self._loaded = self._loaded is not None, None
            if held or _bytes(key[0]) > LARGE:  # collecting takes longer than a small run
                gc.collect()  # a model is full of circles, this session's or one that was used before it
                give_back_freed()
            refuse_unless_it_fits(spec, self.settings)
            self.phases.begin("load")
            settings = self.settings
            self._reserve = {device: round((1 - USABLE) * (free_bytes(device) or 0)) for device in settings.held_on}
            loaded = load_model(spec, settings.device, settings.trust_remote_code, settings.offload, settings.devices)
            self._loaded = (key, *loaded)
            self.phases.end()
        elif not (spec.packs or self.settings.offload):
            self._read(spec, self._loaded[1])
        return self._loaded[1], self._loaded[2]

    def _read(self, spec: RunSpec, model: Any) -> None:
        """Read the weights that a packed run left in their files, and those that there was no room for."""
        settings = self.settings
        if not any_unread(model):
            return
        may = bool(settings.devices) and may_leave(spec, settings.device, read_config(spec))
        if not may:
            refuse_unless_it_fits(spec, settings)
        self.phases.begin("load")
        read_some(model, self._room if may else lambda weight: True)
        self.phases.end()

    def _room(self, weight: Tensor) -> bool:
        """Whether a device has room for a weight that may as well stay in its file."""
        free = free_bytes(weight.device)
        return free is None or free - weight.nbytes >= self._reserve.get(weight.device, 0)

    def adopt(self, spec: RunSpec, model: Any, processor: Any) -> None:
        """Take a model that is loaded already for the one that a spec names."""
        self.keep_originals = "auto"
        self._loaded = (self._model_key(spec), model, processor)

    def _model_key(self, spec: RunSpec) -> tuple[Path, Hashable, Hashable]:
        folder = find_checkpoint(spec.model).folder
        return folder, state_of_tree(folder), precision(spec, self.settings.device)

    def processor(self, spec: RunSpec) -> Any:
        """The processor of a run. The model is not loaded for it if only worker processes need the model."""
        import torch

        if self.settings.in_process:
            return self.model(spec)[1]
        refuse_unless_it_fits(spec, self.settings)
        return load_processor(spec, torch.device("cpu"), self.settings.trust_remote_code)

    def task(self, spec: RunSpec) -> LoadedTask:
        """The task of a run, ready to be asked."""
        key = (spec.task.model_dump_json(), spec.seed)
        if key not in self._tasks:
            self._tasks[key] = load_task(spec.task, spec.seed)
        return self._tasks[key]

    def questions(self, spec: RunSpec) -> list[Question]:
        """All questions of the run's task, with prompts for its model, in the order of the work."""
        from qapbench.tasking.lm import AskingLM
        from qapbench.tasking.questions import ask

        folder = find_checkpoint(spec.model).folder
        key = (folder, spec.task.model_dump_json(), spec.seed)
        if key not in self._questions:
            task = self.task(spec)
            lm = AskingLM(self.processor(spec), str(folder), images=task.has_images)
            self._questions = {key: ask(task, lm, spec.seed)}
        return self._questions[key]

    def pruning(self, spec: RunSpec, on_view: Callable[[PruningView], None] | None = None) -> Pruning | None:
        """The pruning of a run on its loaded model; None if it does not prune.

        Args:
            spec: the run.
            on_view: called with the scores and the selection of every view.
        """
        if spec.prune is None:
            return None
        model, processor = self.model(spec)
        prune = spec.prune
        if prune.budget is not None:
            prune = resolved(prune, costed_model(model, named_tower=spec.text_tower), spec.quantize)
        return build_pruning(family_of(model), prune, Receipt(), processor, None, spec.text_tower, on_view=on_view)

    @contextlib.contextmanager
    def quantized(self, planned: Planned) -> Iterator[Receipt]:
        """While the context is open, the loaded model is quantized and calibrated as the run asks, and not pruned.

        Yields:
            The receipt, which fills while the model runs.
        """
        spec = planned.spec.model_copy(update={"prune": None})
        model, processor = self.model(spec)
        calibration = self.calibration(planned)
        self.phases.begin("quantize")
        with compress(model, spec, processor, calibration=calibration, keep_originals=self.keep_originals) as receipt:
            self.phases.begin("answer")
            yield receipt
        self.phases.end()

    def calibration(self, planned: Planned) -> CalibrationSamples | None:
        """The calibration samples of a run; None if it does not calibrate.

        Results of calibration are kept beside the runs.
        """
        spec = planned.spec
        wanted = spec.quantize.calibration if spec.quantize else None
        if wanted is None:
            return None
        key = (find_checkpoint(spec.model).folder, spec.task.model_dump_json(), spec.seed, wanted.model_dump_json())
        if key not in self._samples:
            task = self.task(spec.calibrating())
            self._samples = {key: calibration_samples.samples(task, wanted, self.model(spec)[1])}
        content, shorten = planned.fingerprints, None
        if not wanted.pruned:  # the pruner has no influence, so all pruners of a sweep share one calibration
            kinds = ("model", "precision", "vision", "family")
            content = {key: value for key, value in content.items() if key.split()[0] in kinds}
        elif (pruning := self.pruning(spec)) is not None:
            content = {**content, "prune": pruning.spec.model_dump_json()}
            shorten = pruning.shorten
        return dataclasses.replace(
            self._samples[key],
            cache=self.settings.runs / CALIBRATIONS,
            fingerprints=content,
            shorten=shorten,
            report=lambda what, done, total: self.progress(f"{spec.name}: {what}", done, total),
        )
