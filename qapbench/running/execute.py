"""Makes runs: locks them, answers what is missing, scores the answers, and writes the records."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qapbench.bars import only_told, shown
from qapbench.errors import UserError
from qapbench.progress import ProgressCallback, silent
from qapbench.records.intact import FILES, SPEC
from qapbench.records.record import RECORD, Record, read_record, write_record
from qapbench.records.store import ANSWERS, answers_of, set_aside, write_json
from qapbench.spec.run_spec import RunSpec
from qapbench.spec.spec_file import load_spec
from qapbench.spec.sweep_spec import SweepSpec

from .engines import crew_of, make_settings
from .plan import Planned
from .planner import Planner
from .quiet import no_foreign_bars
from .settings import BATCH, EngineName, Settings

if TYPE_CHECKING:
    from qapbench.tasking.outline import TaskOutline
    from qapbench.tasking.tasks import LoadedTask

    from .active_run import ActiveRun
    from .fast import Verdict
    from .loaded import Loaded
    from .session import Session
    from .status import Status


def run(
    spec: str | Path | RunSpec | SweepSpec | Mapping[str, Any] | Iterable[RunSpec],
    runs: str | Path = "runs",
    *,
    tasks: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | None = None,
    model: Any = None,
    processor: Any = None,
    fresh: bool = False,
    fast: bool = False,
    batch_size: int | None = None,
    device: str | None = None,
    workers: int | None = None,
    engine: EngineName = "local",
    address: str | None = None,
    gpus_per_worker: float = 1.0,
    spill: bool = False,
    offload: bool = False,
    trust_remote_code: bool = False,
    threads: int | None = None,
    progress: ProgressCallback | bool | None = True,
    report: ProgressCallback | None = None,
) -> list[Record]:
    """Make the runs that are missing, and return the record of each run in order.

    Args:
        spec: a spec file, the name of a shipped spec, a spec, several specs, or the content of a spec file as a
            dictionary, from which the model and the task may be left out if they are given here.
        runs: folder of the results, one sub-folder per run. Results that are there already are used, never made twice.
        tasks: a task or several, as they stand under `task` in a spec; they replace those of the spec.
        model: a loaded model to use in place of the one that the spec names. A run is identified by its weights. After
            the run it is as before.
        processor: the processor of that model.
        fresh: make every run anew. Earlier results are set aside, not deleted.
        fast: ask a stratified subset first, and stop the rows that are out of reach there.
        batch_size: number of questions answered together, 8 if None. No answer depends on it.
        device: "cpu", "cuda" or another torch device; if None, a GPU if there is one.
        workers: number of processes that share the questions. With GPUs, each has its own as far as they suffice. None
            is one, and with Ray as many as the cluster has room for.
        engine: where workers run: "local" is processes of this machine, "ray" a Ray cluster (docs/cluster.md).
        address: address of the Ray cluster, or "auto"; None starts Ray on this machine.
        gpus_per_worker: share of a GPU that each worker of a Ray cluster has to itself.
        spill: keep image features for later quantizers in a memory-mapped file below `runs`.
        offload: leave the decoder's weights in the checkpoint's files, where every forward pass reads them: slower, and
            no answer depends on it.
        trust_remote_code: let a checkpoint run its own Python code.
        threads: threads of each process on a CPU. None gives a small model one, and others all cores, shared among the
            workers. No answer depends on it.
        progress: True shows bars in a terminal and a line in a notebook, and nothing elsewhere; False shows nothing. A
            function is called with (run name, questions answered, questions in all) instead.
        report: the name of `progress` in version 0.1.

    Raises:
        UserError: the spec, the model or the data are wrong.
        NotQuantizedError: a run asks for quantization that never reached a matmul.
    """
    if report is not None:
        import warnings

        warnings.warn("run(report=...) is now run(progress=...); report goes in 0.3", DeprecationWarning, stacklevel=2)
    if model is not None and (workers not in (None, 1) or device is not None or engine != "local" or offload):
        raise UserError("run(model=...) uses the model where it is: leave `workers`, `device` and `offload` out")
    specs = as_specs(spec, {"model": "?"} if model is not None else {}, tasks)
    asked = report or progress
    with no_foreign_bars(), contextlib.ExitStack() as stack:
        told = stack.enter_context(shown() if asked is True else only_told(asked or silent))
        loaded: Loaded | None = None
        if model is not None:
            from .loaded import standing_for

            loaded = stack.enter_context(standing_for(model, processor, Path(runs)))
            specs = [loaded.of(one) for one in specs]
        settings = make_settings(
            Path(runs),
            loaded.device if loaded else device,
            batch_size=batch_size or BATCH,
            workers=workers,
            engine=engine,
            spill=spill,
            offload=offload,
            trust_remote_code=trust_remote_code,
            threads=threads,
            address=address,
            gpus_per_worker=gpus_per_worker,
        )
        session = loaded.session(specs, settings, told) if loaded else None
        return make_runs(specs, settings, fresh, fast, told, session=session)


def as_specs(
    spec: str | Path | RunSpec | SweepSpec | Mapping[str, Any] | Iterable[RunSpec],
    defaults: Mapping[str, Any] | None = None,
    tasks: Any = None,
) -> list[RunSpec]:
    """The runs that `spec` stands for, in any form that `run` accepts.

    Args:
        spec: the spec.
        defaults: fields for a dictionary that lacks them.
        tasks: what stands under `task` in their place; None keeps the tasks of the spec.
    """
    if tasks is not None:
        asked = [tasks] if isinstance(tasks, str | Mapping) else list(tasks)
        if isinstance(spec, Mapping):
            return as_specs({**spec, "task": asked}, defaults)
        of_tasks = RunSpec.parse({"model": "?", "task": asked})
        update = {"task": of_tasks.task, "tasks": of_tasks.tasks}
        return [one.model_copy(update=update) for one in as_specs(spec, defaults)]
    if isinstance(spec, Mapping):
        return as_specs(SweepSpec.parse({**(defaults or {}), **spec}))
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
    """The records of the runs in order, made now or read from disk. No model is loaded if nothing is missing.

    Args:
        specs: the runs.
        settings: where and how they are made.
        fresh: make every run anew. Earlier results are set aside, not deleted.
        fast: ask a stratified subset first, and stop the rows that are out of reach there.
        progress: called with (run name, questions answered, questions in all).
        planner: a planner that has read the tasks already; a new one if None.
        session: a session that has loaded the model already; it takes over these settings. A new one if None.

    Raises:
        UserError: the model or the data are wrong, or another process makes one of the runs.
        NotQuantizedError: a run asks for quantization that never reached a matmul.
    """
    if settings.runs.exists() and not settings.runs.is_dir():
        raise UserError(f"--runs {settings.runs}: it is no folder")
    planner = planner or Planner(settings.runs, settings.device)
    rows = [(spec, planner.parts(spec)) for spec in specs]
    plans = [planner.plan(part, fresh=fresh) for _, parts in rows for part in parts]
    plans += _blank_plans([part for spec, parts in rows if spec.strata for part in parts], planner, fresh)
    todo = {plan.id: plan for plan in plans if fresh or not (plan.done or (fast and plan.stopped))}
    for plan in plans:
        if plan.id not in todo:
            progress(plan.spec.name, plan.answered, plan.total)
    with contextlib.ExitStack() as stack:
        for plan in todo.values():
            stack.enter_context(answers_of(plan.folder).locked())
        for plan in todo.values():
            _prepare(plan, fresh)
        together: dict[Hashable, list[Planned]] = {}
        for plan in todo.values():
            together.setdefault(planner.together(plan.spec), []).append(plan)
        if together:
            from .status import Status

            status = stack.enter_context(Status(settings.runs, list(todo.values()), settings.engine).noted())
            execution = stack.enter_context(contextlib.closing(Execution(settings, progress, status, session)))
            for some in together.values():
                execution.make(some, fast)
    done = iter([read_record(plan.folder).named(plan.spec.name) for plan in plans])
    return [_row(spec, parts, [next(done) for _ in parts], settings.runs) for spec, parts in rows]


def _blank_plans(parts: Iterable[RunSpec], planner: Planner, fresh: bool) -> list[Planned]:
    """The plans of the runs on blank images that tell which questions need their image, each once."""
    plans = [planner.plan(part.without_images(), fresh=fresh) for part in parts if _has_images(planner.task(part))]
    return list({plan.id: plan for plan in plans}.values())


def _has_images(task: TaskOutline) -> bool:
    return any(len(task.images(doc)) for doc in range(task.count))


def _row(spec: RunSpec, parts: Sequence[RunSpec], records: Sequence[Record], runs: Path) -> Record:
    """The record of a run: that of its only part, or one of all its tasks, which is then written."""
    if len(parts) == 1:
        return records[0]
    from .several import joined

    record = joined(spec, parts, records)
    folder = runs / record.run_id
    folder.mkdir(parents=True, exist_ok=True)
    record = record.named(spec.name)
    _write_unless_kept(folder, record)
    write_json(folder / SPEC, record.spec)
    return record


class Execution:
    """Makes runs with one session, so that what they share is computed once.

    Args:
        settings: where and how runs are made.
        progress: called with (run name, questions answered, questions in all).
        status: is told how far the runs are, and what fails.
        session: a session to use; a new one if None.
    """

    def __init__(
        self, settings: Settings, progress: ProgressCallback, status: Status, session: Session | None = None
    ) -> None:
        from .session import Session

        self.settings = settings
        self.status = status
        self.session = session or Session(settings, progress)
        self.session.settings = settings
        self.crew = crew_of(settings)

    def close(self) -> None:
        """End the workers."""
        if self.crew is not None:
            self.crew.close()

    def make(self, plans: Sequence[Planned], fast_first: bool) -> None:
        """Make runs of one model and one task, and write their records.

        Args:
            plans: the runs.
            fast_first: ask a subset first, and stop the rows that are out of reach there.
        """
        from qapbench.models.loading import precision

        from . import fast, scoring
        from .active_run import ActiveRun
        from .threads import threads_of
        from .workers import WorkerPool

        spec, device = plans[0].spec, self.settings.device
        if device.type == "cuda" and self.crew is None:
            torch.cuda.reset_peak_memory_stats(device)
        active_runs = [ActiveRun(plan) for plan in plans]
        self.status.watch(active_runs)
        processor, task = self.session.processor(spec), self.session.task(spec)
        questions = self.session.questions(spec)
        threads = threads_of(spec, self.settings)
        pool = WorkerPool(self.session, processor, threads, self.crew, self.status)
        stopped: dict[str, Verdict] = {}
        some = fast.subset(questions) if fast_first else questions
        if len(some) < len(questions):
            pool.answer(active_runs, some)
            rights = [self._rights(active, task, processor, some) for active in active_runs]
            stopped = fast.stopped(active_runs, rights)
        pool.answer([active for active in active_runs if active.planned.id not in stopped], None)
        machine = {
            "batch_size": self.settings.batch_size,
            "workers": self.crew.size if self.crew else 1,
            "threads": threads,
            "engine": self.settings.engine,
            "dtype": precision(spec, device),
            "image_processor": type(processor.image_processor).__name__,
        }
        if self.crew is not None and self.crew.device is not None:
            machine["device"] = self.crew.device
        for active in active_runs:
            verdict = stopped.get(active.planned.id)
            had = active.answers(questions)
            asked = [q for q in questions if q.refused is None and (q.place in had or not verdict)]
            refused = [q for q in (some if verdict else questions) if q.refused is not None]
            why = verdict.record(len(asked), len(questions)) if verdict else None
            record = scoring.finish(active, task, asked, refused, processor, machine, device, why, pool.peak)
            _write_unless_kept(active.planned.folder, record.named(active.spec.name))

    def _rights(self, active: ActiveRun, task: LoadedTask, processor: Any, asked: Sequence[Any]) -> dict[str, bool]:
        """For each question of a subset, whether a run answered it right by the task's score.

        A question without a score of 0 or 1 is left out.
        """
        from qapbench.tasking.scores import score

        unique = {answer.doc: answer for answer in active.answers(asked).values()}
        scores = score(list(unique.values()), task, processor, active.spec.seed, sorted(unique))
        name = task.score or scores.columns[-1]
        return {one.id: one.metrics[name] == 1 for one in scores.questions if one.metrics.get(name) in (0, 1)}


def _prepare(plan: Planned, fresh: bool) -> None:
    """Make the folder of a locked run ready to be written.

    Scores and receipt that are damaged go, since they are made anew; nothing else is deleted.
    """
    folder = plan.folder
    if fresh or not folder.is_dir():
        set_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*FILES, RECORD, SPEC):
        for draft in folder.glob(f"{name}.*.tmp"):  # of a process that was killed
            draft.unlink()
        if not (folder / name).is_file():
            set_aside(folder / name)
        elif name in plan.damaged and name != ANSWERS:
            (folder / name).unlink()
    write_json(folder / SPEC, plan.spec)


def _write_unless_kept(folder: Path, record: Record) -> None:
    """Write a record, unless the one that is there says the same: a mended run is then as it was, to the byte."""
    try:
        kept: Record | None = read_record(folder)
    except UserError:
        kept = None
    if kept is None or not kept.made_alike(record):
        write_record(folder, record)
