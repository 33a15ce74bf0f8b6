"""Where a real run spends its time: in the tower, in the choice of tokens, in prefill and in decoding."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from qapbench.models import Family, family_of
from qapbench.records.record import Record
from qapbench.running.execute import make_runs
from qapbench.running.session import Session
from qapbench.running.settings import Settings, find_device
from qapbench.spec.run_spec import RunSpec
from qapbench.spec.task_spec import TaskSpec
from qapbench.tasking.tasks import load_task

from . import random_llava

TOWER, PREFILL, DECODE = "tower", "prefill", "decode"
EMBEDDED, RANDOM = "diagram-llava", "random-100m"  # models to measure


@dataclasses.dataclass
class Spent:
    """What a stage took: CPU seconds of this process, wall seconds, and the number of calls."""

    cpu: float = 0.0
    wall: float = 0.0
    calls: int = 0


class StageClock:
    """Adds up what each stage of a model takes, from hooks on its modules.

    The tower counts with the projector. A forward pass of one new token per row is decoding, any other is prefill.

    Args:
        family: the model.

    Attributes:
        spent: what each stage took so far.
        now: the stage under way; "" between stages.
    """

    def __init__(self, family: Family) -> None:
        self.family = family
        self.spent: dict[str, Spent] = defaultdict(Spent)
        self.now = ""
        self._since: tuple[float, float] = (0.0, 0.0)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the stages while the context is open."""
        parts = self.family.parts
        stages: list[tuple[nn.Module, Callable[[Any], str]]] = [
            (parts["vision"], lambda kwargs: TOWER),
            (parts["projector"], lambda kwargs: TOWER),
            (self.family.model, _language_stage),
        ]
        handles = []
        for module, stage in stages:
            handles.append(module.register_forward_pre_hook(self._enter(stage), with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, stage: Callable[[Any], str]) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self.now = stage(kwargs)
            self._since = time.process_time(), time.perf_counter()

        return hook

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        spent = self.spent[self.now]
        spent.cpu += time.process_time() - self._since[0]
        spent.wall += time.perf_counter() - self._since[1]
        spent.calls += 1
        self.now = ""


def _language_stage(kwargs: dict[str, Any]) -> str:
    return DECODE if kwargs["input_ids"].shape[1] == 1 else PREFILL


class Bench:
    """A loaded model with a task, on which runs are made over and over.

    Args:
        model: `EMBEDDED`, `RANDOM` (made on the spot), or a checkpoint.
        folder: folder for checkpoints and records.
        limit: number of questions.
        batch_size: number of questions that are answered together.
        task: the task.
    """

    def __init__(self, model: str, folder: Path, limit: int, batch_size: int, task: str = "diagramqa") -> None:
        if model == RANDOM:
            docs = load_task(TaskSpec(name=task)).docs
            random_llava.save(folder / RANDOM, (doc["text"] for doc in docs))
            model = str(folder / RANDOM)
        self.folder, self.runs = folder, 0
        self.base: dict[str, Any] = {"name": "measured", "model": model, "task": {"name": task, "limit": limit}}
        self.session = Session(Settings(folder / "unused", find_device("cpu"), batch_size))

    def spec(self, answers: str = "letter", **sections: Any) -> RunSpec:
        """A dense run in full precision, or what the sections of a spec make of it."""
        return RunSpec.parse({**self.base, "task": {**self.base["task"], "answers": answers}, **sections})

    def family(self, spec: RunSpec) -> Family:
        """The model, loaded."""
        return family_of(self.session.model(spec)[0])

    def run(self, spec: RunSpec) -> Record:
        """Make a run anew, in a folder of its own."""
        self.runs += 1
        settings = dataclasses.replace(self.session.settings, runs=self.folder / f"runs-{self.runs}")
        (record,) = make_runs([spec], settings, session=self.session)
        return record
