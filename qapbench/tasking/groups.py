"""Expands groups of tasks, lm-eval's, lmms-eval's and the user's own, into their tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qapbench.errors import Problem, UserError
from qapbench.spec.task_spec import TaskSpec

from .index import lm_eval_index
from .lmms_index import lmms_members
from .outline import letter_base, typo_of
from .registry import tasks
from .task_file import group_of_file, groups_of, tasks_of
from .task_yaml import member_names

NAME = ("task", "name")


def expanded(listed: Sequence[TaskSpec]) -> list[TaskSpec]:
    """The tasks of a list in which groups may stand: each group is replaced by its tasks, with the group's options.

    Args:
        listed: the tasks and groups.

    Raises:
        UserError: a group's tasks cannot be named, or a task is listed twice. The error has the place in the list.
    """
    found: list[TaskSpec] = []
    for at, spec in enumerate(listed):
        try:
            members = _members(spec)
            twice = [one for one in members if one in found]
            if twice:
                raise UserError(Problem(f"task '{twice[0].name}' is listed twice with the same options", NAME))
        except UserError as error:
            raise UserError([placed(problem, at, len(listed)) for problem in error.problems]) from None
        found += members
    return found


def placed(problem: Problem, at: int, among: int) -> Problem:
    """The problem of one task of a list, with the task's place in it.

    Args:
        problem: the problem, as of a spec with that task alone.
        at: index of the task.
        among: number of tasks in the list.
    """
    if among == 1 or problem.where[:1] != ("task",):
        return problem
    return Problem(problem.message, ("task", at, *problem.where[1:]), problem.line)


def _members(spec: TaskSpec) -> list[TaskSpec]:
    """The tasks that a name stands for: those of a group, or the task itself."""
    if spec.origin == "lmms-eval":
        return [_one(spec, name, None) for name in lmms_members(spec.name)]
    if spec.names_file:
        config = group_of_file(Path(spec.name).expanduser())
        if config is None:
            return [spec]
        folder = Path(spec.name).expanduser().resolve().parent
        names = _leaves(str(config["group"]), {str(config["group"]): member_names(config)} | _groups_in(folder))
        own = tasks_of(folder)
        return [_one(spec, name, str(folder) if name in own else None) for name in names]
    if spec.include_path is not None:
        groups = _groups_in(Path(spec.include_path).expanduser())
        if spec.name not in groups:
            return [spec]
        own = tasks_of(Path(spec.include_path).expanduser())
        return [_one(spec, name, spec.include_path if name in own else None) for name in _leaves(spec.name, groups)]
    # The index is asked only for names that are not, or nearly, those of registered tasks.
    if spec.name in tasks or letter_base(spec.name) or typo_of(spec.name):
        return [spec]
    if spec.name not in (groups := lm_eval_index().groups):
        return [spec]
    return [_one(spec, name, None) for name in _leaves(spec.name, groups)]


def _one(spec: TaskSpec, name: str, folder: str | None) -> TaskSpec:
    return spec.model_copy(update={"name": name, "include_path": folder})


def _groups_in(folder: Path) -> dict[str, list[str]]:
    return {name: member_names(config) for name, config in groups_of(folder).items()} if folder.is_dir() else {}


def _leaves(group: str, groups: dict[str, list[str]], above: tuple[str, ...] = ()) -> list[str]:
    """Names of the tasks of a group and of the groups in it, each once.

    Raises:
        UserError: a group contains itself, or members that have no name of their own.
    """
    if group in above:
        raise UserError(Problem(f"the group '{group}' contains itself", NAME))
    if group not in groups:
        return [group]
    if not groups[group]:
        message = f"'{group}' is a group whose members are defined inside of it; list the tasks that you want by name"
        raise UserError(Problem(message, NAME))
    found = [name for member in groups[group] for name in _leaves(member, groups, (*above, group))]
    return list(dict.fromkeys(found))
