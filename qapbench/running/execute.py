"""Makes runs: locks them, answers what is missing, scores the answers, and writes the records."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qapbench.bars import only_told, shown
from qapbench.errors import UserError
from qapbench.progress import ProgressCallback, silent
from qapbench.records.intact import FILES, SPEC
from qapbench.records.record import RECORD, Record, read_record
from qapbench.records.store import ANSWERS, answers_of, set_aside, write_json
from qapbench.spec.run_spec import RunSpec
from qapbench.spec.spec_file import load_spec
from qapbench.spec.sweep_spec import SweepSpec

from .engines import crew_ahead, make_settings
from .execution import Execution, write_unless_kept
from .plan import Planned
from .planner import Planner
from .quiet import no_foreign_bars
from .settings import BATCH, EngineName, Settings

if TYPE_CHECKING:
    from qapbench.tasking.outline import TaskOutline

    from .loaded import Loaded
    from .session import Session


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
    send_files: bool = False,
    spill: bool = False,
    offload: bool = False,
    device_map: str | None = None,
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
        send_files: send checkpoints and data to the nodes of a Ray cluster that do not have them.
        spill: keep image features for later quantizers in a memory-mapped file below `runs`.
        offload: leave the decoder's weights in the checkpoint's files, where every forward pass reads them: slower, and
            no answer depends on it.
        device_map: "auto" spreads the model over all GPUs, one or several, and leaves what they have no room for in the
            checkpoint's files; None puts it on one.
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
    placed = workers not in (None, 1) or device is not None or engine != "local" or offload or device_map is not None
    if model is not None and placed:
        what = "leave `workers`, `device`, `device_map` and `offload` out"
        raise UserError(f"run(model=...) uses the model where it is: {what}")
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
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            threads=threads,
            address=address,
            gpus_per_worker=gpus_per_worker,
            send_files=send_files,
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
    tell: Callable[[Settings], None] = lambda settings: None,
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
        tell: called with the settings as runs are made, before the first one is.

    Raises:
        UserError: the model or the data are wrong, or another process makes one of the runs.
        NotQuantizedError: a run asks for quantization that never reached a matmul.
    """
    if settings.runs.exists() and not settings.runs.is_dir():
        raise UserError(f"--runs {settings.runs}: it is no folder")
    planner = planner or Planner(settings.runs, settings.device)
    rows = [(spec, planner.parts(spec)) for spec in specs]
    with contextlib.ExitStack() as stack:
        crew = None
        if fresh or next(settings.runs.glob(f"*/{RECORD}"), None) is None:  # then there is something to do
            crew = crew_ahead(settings)
        if crew is not None:
            stack.callback(crew.close)
        plans = [planner.plan(part, fresh=fresh) for _, parts in rows for part in parts]
        plans += _blank_plans([part for spec, parts in rows if spec.strata for part in parts], planner, fresh)
        todo = {plan.id: plan for plan in plans if fresh or not (plan.done or (fast and plan.stopped))}
        if settings.may_share:
            from .threads import shared_out

            settings = shared_out(settings, list(todo.values()))
        tell(settings)
        for plan in plans:
            if plan.id not in todo:
                progress(plan.spec.name, plan.answered, plan.total)
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
            made = Execution(settings, progress, status, session, crew)
            execution = stack.enter_context(contextlib.closing(made))
            try:
                for some in together.values():
                    execution.make(some, fast)
                execution.dismiss()
            except Exception:
                execution.finish()
                raise
            execution.finish()
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
    write_unless_kept(folder, record)
    write_json(folder / SPEC, record.spec)
    return record


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
