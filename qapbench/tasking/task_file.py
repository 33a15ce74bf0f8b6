"""Tasks of a user's own: lm-eval YAML files, named by their path or by their name in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qapbench.errors import Problem, UserError, nearest
from qapbench.hashing import code_files, digest_files
from qapbench.spec.task_spec import TaskSpec

from .task_yaml import function_names, included, read_config, read_file

PATH, FOLDER = ("task", "name"), ("task", "include_path")


@dataclass(frozen=True)
class TaskFile:
    """A task that a YAML file of the user's defines.

    Attributes:
        name: name of the task, as the file gives it.
        path: the file.
    """

    name: str
    path: Path

    def code(self) -> str:
        """Hash of the file, of those that it includes, and of the Python files that their functions come from.

        A module that lies beside no YAML file is an installed package, whose version is not looked at.
        """
        files: dict[str, Path] = {}
        for path, entries in included(self.path).items():
            files[f"yaml {path.name} {len(files)}"] = path
            for function in function_names(entries):
                module = path.parent / f"{function.rpartition('.')[0].replace('.', '/')}.py"
                if module.is_file():
                    files |= code_files(module, module.stem)
        return digest_files(files)


def find_task_file(spec: TaskSpec) -> TaskFile | None:
    """The user's file that defines the task of a spec; None if the spec names neither a file nor a folder.

    Raises:
        UserError: there is no such file or folder, the folder defines no such task, or the file defines no single task.
    """
    if spec.names_file:
        return _of_file(Path(spec.name).expanduser())
    if spec.include_path is None:
        return None
    folder = Path(spec.include_path).expanduser()
    if not folder.is_dir():
        raise UserError(Problem(f"{folder}: no such folder", FOLDER))
    files = tasks_of(folder)
    if spec.name not in files:
        raise UserError(Problem(f"no task '{spec.name}' in {folder}; {nearest(spec.name, files)}", PATH))
    if len(files[spec.name]) > 1:
        both = " and ".join(map(str, files[spec.name]))
        raise UserError(Problem(f"'{spec.name}' is defined twice: in {both}", PATH))
    return TaskFile(spec.name, files[spec.name][0])


def _of_file(path: Path) -> TaskFile:
    name = _config(path).get("task")
    if not isinstance(name, str):
        what = "is a group of tasks; name the file of one of them" if isinstance(name, list) else "has no `task: NAME`"
        raise UserError(Problem(f"{path} {what}", PATH))
    return TaskFile(name, path.resolve())


def _config(path: Path) -> dict[str, Any]:
    """The entries of a file that a spec names."""
    if not path.is_file():
        raise UserError(Problem(f"{path}: no such file (an lm-eval YAML file of a task)", PATH))
    try:
        return read_config(path)
    except UserError as error:
        raise UserError([Problem(problem.message, PATH) for problem in error.problems]) from None


def group_of_file(path: Path) -> dict[str, Any] | None:
    """The entries of a file that defines a group of tasks; None if it defines a task.

    Raises:
        UserError: there is no such file, it cannot be read, or it lists tasks without naming their group.
    """
    config = _config(path)
    if "group" not in config and isinstance(config.get("task"), list):
        raise UserError(Problem(f"{path} lists tasks without a name for them; add `group: NAME`", PATH))
    return config if "group" in config else None


def tasks_of(folder: Path) -> dict[str, list[Path]]:
    """The files below a folder that define a task, by its name. Files that cannot be read as YAML define none."""
    found: dict[str, list[Path]] = {}
    for path, config in _files_of(folder):
        if isinstance(name := config.get("task"), str) and "group" not in config:
            found.setdefault(name, []).append(path)
    return found


def groups_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of the files below a folder that define a group of tasks, by its name."""
    return {str(config["group"]): config for _, config in _files_of(folder) if "group" in config}


def _files_of(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The YAML files below a folder and their entries. Files that cannot be read as YAML are left out."""
    for path in sorted([*folder.rglob("*.yaml"), *folder.rglob("*.yml")]):
        try:
            yield path.resolve(), read_file(path)
        except UserError:
            continue
