"""Runs: what is to be done, doing what is missing, and the record of each."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from qapbench.calibration import CalibrationSamples
from qapbench.checkpoints import find_checkpoint
from qapbench.compress import pruned_calls
from qapbench.errors import Problem, UserError
from qapbench.memory import peak_memory
from qapbench.models import family_of
from qapbench.receipt import Receipt
from qapbench.spec import RunSpec
from qapbench.specfile import load_spec
from qapbench.sweepspec import SweepSpec

from . import calibration, fast
from .cells import Cell, worker_of
from .loading import fingerprints, load_model, load_processor, precision
from .plan import Planned, Shared, about_text, group_key, shared_work
from .record import RECORD, Record, named, read_record
from .store import Store, set_aside, write_json
from .tasks import LoadedTask, load_task

Report = Callable[[str, int, int], None]
"""Called with (run name, questions answered, questions in all)."""
CALIBRATIONS = "calibrations"  # folder beside the runs
EngineName = Literal["local", "ray"]
BATCH = 8
MEMORY = 1 << 30  # bytes of shown prompts that may wait for a later quantizer group


def run(
    spec: str | Path | RunSpec | SweepSpec | Iterable[RunSpec],
    runs: str | Path = "runs",
    *,
    fresh: bool = False,
    fast: bool = False,
    batch_size: int | None = None,
    device: str | None = None,
    workers: int = 1,
    engine: EngineName = "local",
    spill: bool = False,
    trust_remote_code: bool = False,
    report: Report | None = None,
) -> list[Record]:
    """Make the runs that are missing and return the record of each, in order.

    Args:
        spec: a spec file or the name of a shipped one, a spec, or several.
        runs: folder of the results, one sub-folder a run. What lies there is taken up, never made twice.
        fresh: make every run anew; earlier results are set aside, not deleted.
        fast: ask a stratified subset first, and stop the rows that are out of reach there.
        batch_size: questions taken up together, 8 where None. No answer depends on it.
        device: "cpu", "cuda", ...; a GPU where there is one.
        workers: processes that share the questions, each on a GPU of its own where there are some.
        engine: where workers run; only processes of this machine so far, "ray" is refused.
        spill: keep image features that wait for another quantizer in a memory-mapped file below `runs`.

    Raises:
        UserError: the spec, the model or the data are wrong.
        NotQuantizedError: a run asks for quantization that never reached a matmul.
    """
    made = Engine(
        Path(runs), batch_size, device, trust_remote_code, report, workers=workers, engine=engine, spill=spill
    )
    return made.run(as_specs(spec), fresh, fast)


def as_specs(spec: str | Path | RunSpec | SweepSpec | Iterable[RunSpec]) -> list[RunSpec]:
    if isinstance(spec, RunSpec):
        return [spec]
    if isinstance(spec, SweepSpec):
        return [RunSpec.parse(cell) for cell in spec.cells()]
    if isinstance(spec, str | Path):
        return load_spec(spec)
    return list(spec)


class Engine:
    """Makes runs, what they have in common only once, and keeps the loaded model."""

    def __init__(
        self, runs: Path, batch_size: int | None = None, device: str | None = None,
        trust_remote_code: bool = False, report: Report | None = None, *, workers: int = 1,
        engine: EngineName = "local", spill: bool = False,
    ) -> None:  # fmt: skip
        if engine == "ray":
            raise UserError(
                "--engine ray: not verified yet, so it is refused; --workers N uses this machine's processes"
            )
        self.runs = runs
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            if self.device.type not in ("cpu", "cuda", "mps", "xpu"):
                raise RuntimeError
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError):  # an AssertionError is what torch without CUDA raises
            raise UserError(f"device: this machine has no '{device}'; try cpu or cuda") from None
        self.batch_size = batch_size or BATCH
        self.trust_remote_code = trust_remote_code
        self.report = report or (lambda name, done, total: None)
        self.workers = workers
        self.engine = engine
        self.spill = spill
        self._loaded: tuple[Hashable, Any, Any] | None = None
        self._tasks: dict[Hashable, LoadedTask] = {}
        self._samples: dict[Hashable, CalibrationSamples] = {}

    def check(self, spec: RunSpec, fields: Collection[str] = ("task", "model")) -> None:
        """Raise UserError where what these fields name is not there; a hub is not asked.

        Args:
            fields: "task", "model"; the latter stands for the text tower too.
        """
        looks: dict[str, Callable[[], object]] = {"task": lambda: self.task(spec), "model": lambda: _check_local(spec)}
        problems: list[Problem] = []
        for field in fields:
            try:
                looks[field]()
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)

    def plan(self, spec: RunSpec, fetch: bool = True) -> Planned:
        """What a run would take up, without loading the model.

        Args:
            fetch: whether checkpoints may be downloaded for it.
        """
        task = self.task(spec)
        wanted = spec.quantize.calibration if spec.quantize else None
        source = calibration.fingerprint(task, wanted) if wanted else ""
        content = fingerprints(spec, task.fingerprint, self.device, fetch, source)
        run_id = spec.digest(content, task.asked)
        text = about_text(content)
        text_key = run_id  # where calibration prunes, the weights themselves depend on the pruner
        if wanted is None or not wanted.pruned:
            text_key = spec.model_copy(update={"prune": None}).digest(text, task.asked)
        folder = self.runs / run_id
        record = read_record(folder) if (folder / RECORD).exists() else None
        stopped = bool(record and record.get("stopped"))
        done = record is not None and not stopped
        answered = task.count if done else len(Store(folder).read())
        return Planned(
            spec, run_id, text_key, group_key(spec, text), folder, task.count, answered, done, stopped, content
        )

    def shared(self, plans: Sequence[Planned]) -> Shared:
        """How much of these plans' missing work is done once; reads the images of the data."""
        missing = {}
        for plan in plans:
            have = {answer["doc"] for answer in Store(plan.folder).read()}
            missing[plan.id] = set() if plan.done else set(range(plan.total)) - have
        return shared_work(plans, [self.task(plan.spec) for plan in plans], missing)

    def run(self, specs: Sequence[RunSpec], fresh: bool = False, fast: bool = False) -> list[Record]:
        """The records of runs, made now or read, in order."""
        plans = [self.plan(spec) for spec in specs]
        todo = {plan.id: plan for plan in plans if fresh or not (plan.done or (fast and plan.stopped))}
        for plan in plans:
            if plan.id not in todo:
                self.report(plan.spec.name, plan.answered, plan.total)
        with contextlib.ExitStack() as stack:
            for plan in todo.values():
                stack.enter_context(Store(plan.folder).locked())
            for plan in todo.values():
                if fresh:
                    set_aside(plan.folder)
                plan.folder.mkdir(parents=True, exist_ok=True)
                write_json(plan.folder / "spec.json", plan.spec.model_dump(mode="json"))
            together: dict[Hashable, list[Planned]] = {}
            for plan in todo.values():
                together.setdefault(self._together(plan.spec), []).append(plan)
            for some in together.values():
                self._make(some, fast)
        return [named(read_record(plan.folder), plan.spec.name) for plan in plans]

    def task(self, spec: RunSpec) -> LoadedTask:
        key = (spec.task.model_dump_json(), spec.seed)
        if key not in self._tasks:
            self._tasks[key] = load_task(spec.task, spec.seed)
        return self._tasks[key]

    def model(self, spec: RunSpec) -> tuple[Any, Any]:
        """The loaded model and processor; the latest one stays loaded."""
        key = (find_checkpoint(spec.model).folder, precision(spec, self.device))
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            self._loaded = (key, *load_model(spec, self.device, self.trust_remote_code))
        return self._loaded[1], self._loaded[2]

    def _calibration(self, planned: Planned) -> CalibrationSamples | None:
        """The samples of a run that calibrates; its result is kept beside the runs."""
        spec = planned.spec
        wanted = spec.quantize.calibration if spec.quantize else None
        if wanted is None:
            return None
        model, processor = self.model(spec)
        key = (self._together(spec), wanted.samples, wanted.seed, wanted.data)
        if key not in self._samples:
            self._samples = {key: calibration.samples(self.task(spec), wanted, model, processor)}
        about, shorten = planned.fingerprints, None
        if not wanted.pruned:  # then nothing of the pruner enters, and a sweep calibrates once
            about = {key: value for key, value in about.items() if key in ("model", "precision", "vision tower")}
        elif spec.prune is not None:
            about = {**about, "prune": spec.prune.model_dump_json()}
            shorten = pruned_calls(family_of(model), spec.prune, Receipt(), processor, None, spec.text_tower).shorten
        return dataclasses.replace(
            self._samples[key], cache=self.runs / CALIBRATIONS, fingerprints=about, shorten=shorten,
            report=lambda what, done, total: self.report(f"{spec.name}: {what}", done, total),
        )  # fmt: skip

    def _together(self, spec: RunSpec) -> Hashable:
        """Runs with an equal one ask the same questions of the same loaded model."""
        return (
            find_checkpoint(spec.model).folder, precision(spec, self.device), spec.task.model_dump_json(), spec.seed,
        )  # fmt: skip

    def _make(self, plans: Sequence[Planned], fast_first: bool) -> None:
        from . import scoring
        from .workers import Crew

        spec, task = plans[0].spec, self.task(plans[0].spec)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        cells = [Cell(plan) for plan in plans]
        here = self.workers == 1 and self.engine == "local"
        # With workers the model is theirs alone.
        processor = self.model(spec)[1] if here else load_processor(spec, torch.device("cpu"), self.trust_remote_code)
        questions = _questions(task, processor, spec)
        crew = Crew(self, cells)
        stopped: dict[str, fast.Verdict] = {}
        if fast_first and len(some := fast.subset(questions)) < len(questions):
            crew.answer(cells, some)
            stopped = fast.stopped(cells, [self._rights(cell, task, processor, some) for cell in cells])
        crew.answer([cell for cell in cells if cell.planned.id not in stopped], None)
        machine = {
            "batch_size": self.batch_size, "workers": self.workers, "engine": self.engine,
            "dtype": precision(spec, self.device), "image_processor": type(processor.image_processor).__name__,
        }  # fmt: skip
        for cell in cells:
            verdict = stopped.get(cell.planned.id)
            had = {(answer["task"], answer["doc"]) for answer in cell.store.read()}
            asked = [question for question in questions if question.place in had] if verdict else questions
            why = {**verdict.to_json(len(questions)), "asked": len(asked)} if verdict else None
            record = scoring.finish(cell, task, asked, processor, machine, self.device, why)
            record["timing"] |= crew.peak
            write_json(cell.planned.folder / RECORD, named(record, cell.spec.name))

    def _rights(self, cell: Cell, task: LoadedTask, processor: Any, asked: Sequence[Any]) -> dict[str, bool]:
        """For each question of a subset whether a run had it right."""
        from . import scoring

        places = {question.place for question in asked}
        answers = [answer for answer in cell.store.read() if (answer["task"], answer["doc"]) in places]
        unique = {answer["doc"]: answer for answer in answers}
        samples = scoring.score(list(unique.values()), task, processor, cell.spec.seed, sorted(unique))
        name = task.columns[-1]  # the overall one
        return {s["id"]: s["metrics"][name] == 1 for s in samples if s["metrics"].get(name) in (0, 1)}

    def answer(
        self, cells: Sequence[Cell], docs: set[int] | None = None, share: tuple[int, int] = (0, 1)
    ) -> dict[str, int]:
        """Answer what cells of one model and task miss, in this process; its peak memory.

        Args:
            docs: only these documents.
            share: (which, of how many) parts of the questions.
        """
        from .sweep import Sweep

        spec = cells[0].spec
        model, processor = self.model(spec)
        questions = _questions(self.task(spec), processor, spec)
        mine = [
            question for index, question in enumerate(questions)
            if (docs is None or question.place[1] in docs) and worker_of(question, index, share[1]) == share[0]
        ]  # fmt: skip
        sweep = Sweep(
            model, processor, questions, cells, self.runs, batch_size=self.batch_size, seed=spec.seed,
            limit=MEMORY // share[1], spill=self.runs if self.spill else None, report=self.report,
            calibrate=self._calibration,
        )  # fmt: skip
        sweep.answer(mine)
        return peak_memory(self.device)

    def settings(self, device: str | None = None) -> dict[str, Any]:
        """What another process needs to make an engine like this one."""
        return {
            "runs": self.runs, "batch_size": self.batch_size, "device": device or str(self.device),
            "trust_remote_code": self.trust_remote_code, "spill": self.spill,
        }  # fmt: skip


def _questions(task: LoadedTask, processor: Any, spec: RunSpec) -> list[Any]:
    from .lm import AskingLM
    from .questions import ask

    return ask(task, AskingLM(processor, str(find_checkpoint(spec.model).folder)), spec.seed)


def _check_local(spec: RunSpec) -> None:
    """Raise UserError for a model or text tower that is neither here nor written like a hub id."""
    for name, where in ((spec.model, "model"), (spec.text_tower, "text_tower")):
        if name and (name.count("/") != 1 or Path(name).exists()):
            find_checkpoint(name, where)
