"""Making runs: lock, answer what is missing, score, and write the record of each."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qapbench.progress import ProgressCallback, silent
from qapbench.records.record import RECORD, Record, read_record
from qapbench.records.store import answers_of, set_aside, write_json
from qapbench.spec.run_spec import RunSpec
from qapbench.spec.spec_file import load_spec
from qapbench.spec.sweep_spec import SweepSpec

from .plan import Planned
from .planner import Planner
from .settings import BATCH, EngineName, Settings, find_device

if TYPE_CHECKING:
    from qapbench.tasking.tasks import LoadedTask

    from .active_run import ActiveRun
    from .fast import Verdict
    from .session import Session


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
    progress: ProgressCallback | None = None,
    report: ProgressCallback | None = None,
) -> list[Record]:
    """Make the runs that are missing and return the record of each, in order.

    Args:
        spec: a spec file or the name of a shipped one, a spec, or several.
        runs: folder of the results, one sub-folder per run. What lies there is taken up, never made twice.
        fresh: make every run anew; earlier results are set aside, not deleted.
        fast: ask a stratified subset first, and stop the rows that are out of reach there.
        batch_size: questions taken up together, 8 where None. No answer depends on it.
        device: "cpu", "cuda", ...; a GPU where there is one.
        workers: processes that share the questions, each on a GPU of its own where there are some.
        engine: where workers run; only processes of this machine so far, "ray" is refused.
        spill: keep image features that wait for another quantizer in a memory-mapped file below `runs`.
        progress: called with (run name, questions answered, questions in all).
        report: the name of `progress` in version 0.1.

    Raises:
        UserError: the spec, the model or the data are wrong.
        NotQuantizedError: a run asks for quantization that never reached a matmul.
    """
    if report is not None:
        import warnings

        warnings.warn("run(report=...) is now run(progress=...); report goes in 0.3", DeprecationWarning, stacklevel=2)
    settings = Settings(Path(runs), find_device(device), batch_size or BATCH, workers, engine, spill, trust_remote_code)
    return make_runs(as_specs(spec), settings, fresh, fast, progress or report or silent)


def as_specs(spec: str | Path | RunSpec | SweepSpec | Iterable[RunSpec]) -> list[RunSpec]:
    """The runs that any of the accepted forms means."""
    if isinstance(spec, RunSpec):
        return [spec]
    if isinstance(spec, SweepSpec):
        return [RunSpec.parse(cell) for cell in spec.cells()]
    if isinstance(spec, str | Path):
        return load_spec(spec)
    return list(spec)


def make_runs(
    specs: Sequence[RunSpec],
    settings: Settings,
    fresh: bool = False,
    fast: bool = False,
    progress: ProgressCallback = silent,
    planner: Planner | None = None,
    session: Session | None = None,
) -> list[Record]:
    """The records of runs, made now or read, in order. Where nothing is missing, no model is loaded.

    Args:
        fresh, fast: as `run`.
        planner: one that has read the tasks already.
        session: one that has loaded the model already; it takes on these settings.
    """
    planner = planner or Planner(settings.runs, settings.device)
    plans = [planner.plan(spec) for spec in specs]
    todo = {plan.id: plan for plan in plans if fresh or not (plan.done or (fast and plan.stopped))}
    for plan in plans:
        if plan.id not in todo:
            progress(plan.spec.name, plan.answered, plan.total)
    with contextlib.ExitStack() as stack:
        for plan in todo.values():
            stack.enter_context(answers_of(plan.folder).locked())
        for plan in todo.values():
            if fresh:
                set_aside(plan.folder)
            plan.folder.mkdir(parents=True, exist_ok=True)
            write_json(plan.folder / "spec.json", plan.spec)
        together: dict[Hashable, list[Planned]] = {}
        for plan in todo.values():
            together.setdefault(planner.together(plan.spec), []).append(plan)
        if together:
            execution = Execution(settings, progress, session)
            for some in together.values():
                execution.make(some, fast)
    return [read_record(plan.folder).named(plan.spec.name) for plan in plans]


class Execution:
    """Makes runs, what they have in common only once."""

    def __init__(self, settings: Settings, progress: ProgressCallback, session: Session | None = None) -> None:
        from .session import Session

        self.settings = settings
        self.session = session or Session(settings, progress)
        self.session.settings = settings

    def make(self, plans: Sequence[Planned], fast_first: bool) -> None:
        """Make runs of one model and one task, and write their records."""
        from qapbench.models.loading import precision

        from . import fast, scoring
        from .active_run import ActiveRun
        from .workers import WorkerPool

        spec, device = plans[0].spec, self.settings.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        active_runs = [ActiveRun(plan) for plan in plans]
        for active in active_runs:
            active.store.keep(len(active.store.read()))  # before any worker appends
        processor, task = self.session.processor(spec), self.session.task(spec)
        questions = self.session.questions(spec)
        pool = WorkerPool(self.session, active_runs)
        stopped: dict[str, Verdict] = {}
        if fast_first and len(some := fast.subset(questions)) < len(questions):
            pool.answer(active_runs, some)
            rights = [self._rights(active, task, processor, some) for active in active_runs]
            stopped = fast.stopped(active_runs, rights)
        pool.answer([active for active in active_runs if active.planned.id not in stopped], None)
        machine = {
            "batch_size": self.settings.batch_size,
            "workers": self.settings.workers,
            "engine": self.settings.engine,
            "dtype": precision(spec, device),
            "image_processor": type(processor.image_processor).__name__,
        }
        for active in active_runs:
            verdict = stopped.get(active.planned.id)
            had = {answer.place for answer in active.store.read()}
            asked = [question for question in questions if question.place in had] if verdict else questions
            why = verdict.record(len(asked), len(questions)) if verdict else None
            record = scoring.finish(active, task, asked, processor, machine, device, why, pool.peak)
            write_json(active.planned.folder / RECORD, record.named(active.spec.name).to_json())

    def _rights(self, active: ActiveRun, task: LoadedTask, processor: Any, asked: Sequence[Any]) -> dict[str, bool]:
        """For each question of a subset whether a run had it right."""
        from . import scoring

        places = {question.place for question in asked}
        unique = {answer.doc: answer for answer in active.store.read() if answer.place in places}
        samples = scoring.score(list(unique.values()), task, processor, active.spec.seed, sorted(unique))
        name = task.columns[-1]  # the overall one
        return {one.id: one.metrics[name] == 1 for one in samples if one.metrics.get(name) in (0, 1)}
