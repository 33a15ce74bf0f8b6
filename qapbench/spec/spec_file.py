"""Reads spec files: safe YAML with line numbers, changes by `--set`, and all mistakes in one report."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from qapbench.errors import Problem, UserError, nearest
from qapbench.methods.plugins import load_plugin_files

from .run_spec import RunSpec
from .sweep_spec import SweepSpec, override
from .task_spec import TaskSpec
from .text import shown, unfit
from .yaml_reader import Lines, read_value, read_yaml

SHIPPED = Path(__file__).parents[1] / "specs"  # their place in an installed wheel
MODELINE = (
    "# yaml-language-server: $schema=qapbench.schema.json\n"  # tells an editor the schema beside the shipped specs
)


class Check(Protocol):
    """Checks that what a run's fields name exists, and raises UserError if not. `fields` limits which are checked."""

    def __call__(self, spec: RunSpec, fields: Collection[str] = ..., /) -> None: ...


def load_spec(
    source: str | Path,
    changes: Sequence[str] = (),
    check: Check | None = None,
    say: Callable[[str], object] = lambda sentence: None,
) -> list[RunSpec]:
    """Read and validate the runs of a spec file. A file without `matrix` or `cases` is one run.

    Args:
        source: a path, or the name of a shipped spec ("quickstart").
        changes: strings `dotted.key=value`, where the value is YAML. They change the fields that all runs share, and
            replace axes of the matrix over the same key. A case that sets the key itself keeps its own value.
        check: checks each run further, for example whether its task and model exist, and raises UserError.
        say: called with a sentence for each axis that is replaced, and each case that keeps its own value.

    Raises:
        UserError: the file has mistakes. All of them are listed, each with its line.
    """
    path = find_spec(source)
    data, lines = read_yaml(path)
    given = dict(map(_parse_change, changes))
    locate = functools.partial(_located, lines=lines, given=tuple(given))
    try:
        data = _changed(data, given, say)
    except UserError as error:
        raise UserError([locate(problem, {}) for problem in error.problems]) from None
    data, problems = _load_plugins(data, path.resolve().parent)
    problems = [locate(problem, {}) for problem in problems]
    runs: list[RunSpec] = []
    try:
        cells = SweepSpec.parse(data).cells_with_changes()
    except UserError as error:
        problems += [locate(problem, {}) for problem in error.problems]
        cells = [({key: value for key, value in data.items() if key not in ("matrix", "cases")}, {})]
    checked: set[str] = set()
    for cell, changed in cells:
        try:
            run = _at(RunSpec.validated(cell), path.resolve().parent)
        except UserError as error:
            apart = _checked_apart(cell, check, checked) if check else []
            problems += [locate(problem, changed) for problem in (*error.problems, *apart)]
            continue
        try:
            if check:
                check(run)
            runs.append(run)
        except UserError as error:
            problems += [locate(problem, changed) for problem in error.problems]
    if problems:
        raise UserError(sorted(dict.fromkeys(problems), key=lambda problem: problem.line or 0))
    return runs


def _checked_apart(cell: dict[str, Any], check: Check, checked: set[str]) -> list[Problem]:
    """Check model and task of a run whose spec is not valid as a whole.

    Args:
        cell: plain data of the run's spec.
        check: checks one field.
        checked: models and tasks of earlier runs, which are not checked again. This run's are added.

    Returns:
        The problems that were found.
    """
    found: list[Problem] = []
    for field in ("model", "task"):
        if (key := f"{field} {cell.get(field)}") in checked:
            continue
        checked.add(key)
        try:
            alone = RunSpec.validated({"model": "?", "task": "?", field: cell.get(field)})
        except UserError:
            continue  # the errors of the spec itself report the mistake
        try:
            check(alone, (field,))
        except UserError as error:
            found += [problem for problem in error.problems if problem.where[:1] == (field,)]
    return found


def find_spec(source: str | Path) -> Path:
    """Path of a spec file.

    Args:
        source: a path, or the name of a shipped spec.

    Raises:
        UserError: there is neither.
    """
    path = Path(source)
    with contextlib.suppress(OSError, ValueError):  # too long, or no path at all
        if path.is_file():
            return path
    shipped = shipped_specs()
    if str(source) in shipped:
        return shipped[str(source)]
    raise UserError(f"no spec file {shown(str(source))}; {nearest(str(source), shipped)}")


def shipped_specs() -> dict[str, Path]:
    """The specs that come with qapbench: name -> file."""
    folders = [SHIPPED, Path(__file__).parents[2] / "specs"]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.yaml"))}


def about_spec(file: Path) -> str:
    """What a spec file is for: the first sentence of the comment at its top; "" if it has none."""
    lines = file.read_text(encoding="utf-8").removeprefix(MODELINE).split("\n")
    comment = " ".join(
        line.removeprefix("#").strip() for line in itertools.takewhile(lambda x: x.startswith("#"), lines)
    )
    return re.split(r"(?<=\.)\s+(?=[A-Z])|\s+(?=qapbench run )", comment)[0]


def _parse_change(text: str) -> tuple[str, Any]:
    """Key and value of a `--set` argument."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set {shown(text)}: expected dotted.key=value")
    if why := unfit(key):
        raise UserError(f"--set {shown(key)}: the key {why}")
    try:
        return key, value if value.startswith("#") else read_value(value)  # a colour, which YAML takes for a comment
    except UserError as error:
        raise UserError([Problem(f"--set {shown(key)}: {problem}") for problem in error.problems]) from None


def _changed(data: dict[str, Any], given: dict[str, Any], say: Callable[[str], object]) -> dict[str, Any]:
    """The data with the changes of `--set`, so that none of them is undone in silence by what varies.

    Args:
        data: plain data of a spec file.
        given: dotted key -> value.
        say: called with what a reader of the command would not expect.

    Raises:
        UserError: a change would reach no run.
    """
    changed = override(data, given)
    problems = []
    for key in given:
        matrix = found if isinstance(found := changed.get("matrix"), dict) else {}
        cases = found if isinstance(found := changed.get("cases"), dict) else {}
        for axis in list(matrix):
            if axis == key or axis.startswith(f"{key}."):
                del matrix[axis]
                say(f"--set {key} replaces the axis {axis} of the matrix")
            elif key.startswith(f"{axis}."):
                message = (
                    f"the matrix sets {axis} as a whole, which undoes --set {key}; change the matrix, or set {axis}"
                )
                problems.append(Problem(message, ("matrix", axis)))
        if changed.get("matrix") == {}:
            del changed["matrix"]
        own = [
            label
            for label, case in cases.items()
            if isinstance(case, dict) and any(other == key or key.startswith(f"{other}.") for other in case)
        ]
        names = ", ".join(shown(label) for label in own)
        if own and len(own) == len(cases):
            message = f"--set {key} would change no run: every case sets it, or a section that it is in, itself"
            problems.append(Problem(message, ("cases",)))
        elif own:
            say(f"--set {key} does not reach cases that set it, or a section that it is in, themselves: {names}")
    if problems:
        raise UserError(problems)
    return changed


def _load_plugins(data: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[Problem]]:
    """Load the plugin files, since the rest of the spec is validated against what they register.

    Returns:
        The data, with paths resolved and without plugins that failed, and the problems of these.
    """
    named = data.get("plugins")
    if not isinstance(named, list) or not all(isinstance(plugin, str) for plugin in named):
        return data, []
    paths = [_beside(plugin, folder) for plugin in named]
    problems = load_plugin_files(paths)
    failed = {problem.where[1] for problem in problems}
    return {**data, "plugins": [path for index, path in enumerate(paths) if index not in failed]}, problems


def _beside(name: str, folder: Path) -> str:
    """Resolve a path in a spec file: relative to the file if that exists, otherwise to the working directory."""
    beside = folder / name
    try:
        return str(beside) if beside.exists() else name
    except (OSError, ValueError):  # too long, not to be entered, or no path at all: looking it up will say so
        return name


def _found(named: str | dict[str, str], folder: Path) -> str | dict[str, str]:
    """`_beside` for a path, or for every path of a mapping."""
    if isinstance(named, dict):
        return {key: _beside(path, folder) for key, path in named.items()}
    return _beside(named, folder)


def _at(spec: RunSpec, folder: Path) -> RunSpec:
    """The spec with its paths resolved.

    Args:
        spec: the run.
        folder: folder of the spec file.
    """
    paths = {name: _beside(value, folder) for name in ("model", "text_tower") if (value := getattr(spec, name))}
    tasks = [_task_at(task, folder) for task in spec.tasks]
    return spec.model_copy(update={**paths, "task": _task_at(spec.task, folder), "tasks": tasks})


def _task_at(task: TaskSpec, folder: Path) -> TaskSpec:
    """The task with its paths resolved."""
    named = ("data", "include_path", *(["name"] if task.names_file else []))
    return task.model_copy(update={name: _found(value, folder) for name in named if (value := getattr(task, name))})


def _located(
    problem: Problem, changed: dict[str, tuple[str | int, ...]], lines: Lines, given: tuple[str, ...]
) -> Problem:
    """The problem, with the line of the value that caused it.

    The value is in a case, in the matrix, or among the shared fields. If it was given by `--set`, it has no line, and
    the message names the key instead.

    Args:
        problem: the problem.
        changed: dotted key -> its path in the file, for keys that a case or the matrix set.
        lines: line of every path in the file.
        given: keys that were given by `--set`.
    """
    if problem.line is not None:
        return problem
    where = problem.where
    roots = [(changed.get(".".join(map(str, where[:size]))), size) for size in range(len(where), 0, -1)]
    set_by = next((key for key in given if tuple(key.split("."))[: len(where)] == where[: len(key.split("."))]), None)
    if set_by and all(root is None for root, _ in roots):
        return replace(problem, message=f"{problem.message} (from --set {set_by})")
    for root, size in [*((root, size) for root, size in roots if root is not None), ((), 0)]:
        for end in range(len(where), size - 1, -1):
            path = (*root, *where[size:end])
            if path in lines:
                return replace(problem, line=lines[path])
    return problem
