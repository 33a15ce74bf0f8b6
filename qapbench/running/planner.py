"""Finds out which runs a spec stands for, what of them is missing, and what they share.

It loads no model, and imports lm-eval only for tasks of lm-eval's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qapbench.checkpoints.find import find_checkpoint
from qapbench.errors import Problem, UserError
from qapbench.hashing import digest_json
from qapbench.models.compressed import check_not_twice
from qapbench.models.loading import precision, read_config
from qapbench.records.intact import damage, lines_in_words
from qapbench.records.record import RECORD, NewerRecordError, Record, read_record
from qapbench.records.store import ANSWERS, answers_of
from qapbench.spec.run_spec import PruneSpec, RunSpec
from qapbench.spec.task_spec import TaskSpec
from qapbench.tasking.groups import expanded, placed
from qapbench.tasking.images import check_pictures
from qapbench.tasking.outline import TaskOutline, calibration_fingerprint
from qapbench.tasking.tasks import find_outline
from qapbench.visible import visible_logger

from .fingerprints import OF_TEXT, about, fingerprints
from .plan import Planned, Shared, group_key, shared_work

LOG = visible_logger(__name__)


class Planner:
    """Plans runs whose results lie in one folder.

    Args:
        runs: folder of the results.
        device: the device that the runs will use; its kind is part of a run's identity.
    """

    def __init__(self, runs: Path, device: torch.device) -> None:
        self.runs = runs
        self.device = device
        self._tasks: dict[Hashable, TaskOutline] = {}
        self._expanded: dict[str, list[TaskSpec]] = {}
        self._checked: set[str] = set()

    def task(self, spec: RunSpec) -> TaskOutline:
        """The outline of the run's task. Each task is read once.

        Raises:
            UserError: there is no such task, or its data cannot be read.
        """
        key = (spec.task.model_dump_json(), spec.seed)
        if key not in self._tasks:
            self._tasks[key] = find_outline(spec.task, spec.seed)
        return self._tasks[key]

    def parts(self, spec: RunSpec) -> list[RunSpec]:
        """The runs of one task each that a spec stands for: several if it lists tasks, or names a group of them.

        Raises:
            UserError: a group cannot be expanded, or a task is listed twice.
        """
        listed = spec.tasks or [spec.task]
        key = str([task.model_dump_json() for task in listed])
        if key not in self._expanded:
            self._expanded[key] = expanded(listed)
        return spec.one_by_one(self._expanded[key])

    def check(self, spec: RunSpec, fields: Collection[str] = ("task", "model")) -> None:
        """Check that what a spec names exists. No hub is asked.

        Args:
            spec: the run.
            fields: what to check: "task", "model" or both. "model" includes the text tower.

        Raises:
            UserError: something is not there.
        """
        checks: dict[str, Callable[[], object]] = {
            "task": lambda: self._check_task(spec),
            "model": lambda: _check_local(spec),
        }
        problems: list[Problem] = []
        for field in fields:
            try:
                checks[field]()
            except UserError as error:
                problems += error.problems
            except OSError as error:  # a folder that may not be entered, for example
                problems.append(Problem(f"{error.filename}: {error.strerror}", (field,)))
        if problems:
            raise UserError(problems)

    def check_data(self, specs: Iterable[RunSpec]) -> None:
        """Decode every picture that the runs ask about.

        Raises:
            UserError: some cannot be decoded; all are named, each once.
        """
        tasks = {id(task): task for spec in specs for task in map(self.task, self.parts(spec))}.values()
        problems: dict[str, Problem] = {}
        for task in tasks:
            try:
                check_pictures((name, task.images(doc)) for doc, name in enumerate(task.ids))
            except UserError as error:
                problems |= {str(problem): problem for problem in error.problems}
        if problems:
            raise UserError(problems.values())

    def _check_task(self, spec: RunSpec) -> None:
        """Check that all tasks and their data are there. Neither the seed nor a limit of the questions matters for it.

        Raises:
            UserError: some are not. Every problem has its task's place in the list.
        """
        parts, problems = self.parts(spec), list[Problem]()
        for at, part in enumerate(parts):
            key = part.task.model_copy(update={"limit": None}).model_dump_json()
            if key in self._checked:
                continue
            try:
                self.task(part)
                self._checked.add(key)
            except UserError as error:
                inside = len(parts) == len(spec.tasks)  # a group among them has no lines for its tasks
                problems += [placed(problem, at, len(parts)) if inside else problem for problem in error.problems]
        try:
            self._calibrating(parts[0])
        except UserError as error:
            problems += [problem for problem in error.problems if problem.where[:1] == ("quantize",)]
        if problems:
            raise UserError(problems)

    def plan(self, spec: RunSpec, fetch: bool = True, fresh: bool = False) -> Planned:
        """The plan of a run.

        Args:
            spec: the run.
            fetch: whether checkpoints may be downloaded.
            fresh: whether the run will be made anew, whatever its folder holds.

        Raises:
            UserError: the model, the task or the calibration data are not there, or a newer qapbench wrote the record
                in the run's folder.
        """
        task = self.task(spec)
        wanted = spec.quantize.calibration if spec.quantize else None
        source = self._calibration_source(spec)
        content = fingerprints(spec, task, self.device, fetch, source)
        if spec.prune and spec.prune.budget is not None:
            content |= {"keep": str(self._keep(spec, spec.prune))}
        run_id = spec.digest(content, task.asked)
        text_key = run_id  # if calibration prunes, the weights depend on the pruner
        if wanted is None or not wanted.pruned:
            text_key = spec.model_copy(update={"prune": None}).digest(about(content, OF_TEXT), task.asked)
        folder = self.runs / run_id
        record = _record(folder, fresh)
        damaged = damage(folder, record) if record and not fresh else {}
        if damaged:
            LOG.warning("%s: %s; what is intact is kept, the rest is made anew", folder, ", ".join(damaged.values()))
            record = None
        stopped = record is not None and record.stopped is not None
        done = record is not None and not stopped
        if record is not None and done:
            answered = task.count - len(record.unanswered)
        else:
            answered = _answered(folder, told=bool(damaged) or fresh)
        group, values = group_key(spec, content), group_key(spec, content, stored=False)
        names = tuple(damaged)
        return Planned(
            spec, run_id, text_key, group, folder, task.count, answered, done, stopped, names, content, fresh, values
        )

    def _keep(self, spec: RunSpec, prune: PruneSpec) -> int:
        """The number of tokens that a budget given as a cost stands for.

        Raises:
            UserError: the method cannot come near it on this model.
        """
        from qapbench.costing.budget import resolved
        from qapbench.costing.known import costed_model

        model = costed_model(spec.model, precision(spec, self.device), spec.text_tower)
        return resolved(prune, model, spec.quantize).keep

    def _calibration_source(self, spec: RunSpec) -> str:
        """Hash of the source of the run's calibration samples; "" if it does not calibrate.

        Raises:
            UserError: there is no such task or file.
        """
        wanted = spec.quantize.calibration if spec.quantize else None
        if wanted is None:
            return ""
        task = self._calibrating(spec)
        source = calibration_fingerprint(task, wanted)
        return digest_json([source, task.name, task.code]) if wanted.task else source

    def _calibrating(self, spec: RunSpec) -> TaskOutline:
        """The outline of the task whose questions calibrate the run."""
        other = spec.calibrating()
        try:
            return self.task(other)
        except UserError as error:
            if other is spec:
                raise
            where = ("quantize", "calibration", "task")
            raise UserError([replace(problem, where=where) for problem in error.problems]) from None

    def shared(self, plans: Sequence[Planned]) -> Shared:
        """Count the missing work that these runs share. This reads the images of the data."""
        missing = {}
        for plan in plans:
            have = {answer.doc for answer in answers_of(plan.folder).read()}
            missing[plan.id] = set() if plan.done else set(range(plan.total)) - have
        return shared_work(plans, [self.task(plan.spec) for plan in plans], missing)

    def together(self, spec: RunSpec) -> Hashable:
        """Key of the runs that ask the same questions of the same loaded model."""
        folder = find_checkpoint(spec.model).folder
        return folder, precision(spec, self.device), spec.task.model_dump_json(), spec.seed


def _answered(folder: Path, told: bool) -> int:
    """Number of answers that an unfinished run has.

    Args:
        folder: the run's folder.
        told: whether the user knows of its damage already.
    """
    found = answers_of(folder).scan()
    if found.damaged and not told:
        LOG.warning("%s: %s is damaged in %s; asked again", folder, ANSWERS, lines_in_words(found.damaged))
    return len({answer.place for answer in found.lines})


def _check_local(spec: RunSpec) -> None:
    """Check that model and text tower are on this machine, unless their names look like hub ids.

    Raises:
        UserError: one of them is not.
    """
    for name, where in ((spec.model, "model"), (spec.text_tower, "text_tower")):
        if name and (name.count("/") != 1 or Path(name).exists()):
            folder = find_checkpoint(name, where).folder
            if where == "model" and spec.quantize is not None and (folder / "config.json").is_file():
                check_not_twice(spec, read_config(spec))


def _record(folder: Path, fresh: bool) -> Record | None:
    """The record in a run's folder; None if there is none, or if it will be made anew.

    A damaged record is made anew from the stored answers, of which none is lost.

    Raises:
        UserError: a newer qapbench wrote it, and it is not going to be set aside.
    """
    if not (folder / RECORD).exists():
        return None
    try:
        return read_record(folder)
    except NewerRecordError as error:
        if fresh:
            return None
        raise UserError(f"{error}, or set the run aside with --fresh") from None
    except UserError as error:
        LOG.warning("made anew from the stored answers: %s", error)
        return None
