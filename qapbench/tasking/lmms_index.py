"""Finds the tasks of lmms-eval by name. lmms-eval is not imported for it, which would take seconds."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qapbench.errors import Problem, UserError, nearest
from qapbench.hashing import code_files, digest_files, digest_json

from .task_file import TaskFile
from .task_yaml import function_names, included, member_names, read_file

NAME = ("task", "name")
INSTALL = "pip install 'qapbench[lmms-eval]'"
LIGHT = "pip install --no-deps 'lmms-eval>=0.7.1,<0.8' && pip install accelerate loguru tenacity"
"""The same without the forty packages that only models and video tasks need."""
_KEY = r"^[\"']?{}[\"']?[ \t]*:[ \t]*[\"']?([^\s\"'#\[]+)"
_TASK, _GROUP = (re.compile(_KEY.format(key), re.MULTILINE) for key in ("task", "group"))  # no list of tasks matches
_TAGS = re.compile(r"^[\"']?tag[\"']?[ \t]*:[ \t]*(\[[^\]]*\]|(?:\n[ \t]*-[^\n]+)+|[^\n]+)", re.MULTILINE)
_TAG = re.compile(r"(?:^|[\[,-])[ \t\n]*[\"']?([^\s\"'\[\],#-][^\s\"'\[\],#]*)")


@dataclass(frozen=True)
class LmmsTaskFile(TaskFile):
    """A task that comes with lmms-eval."""

    def entries(self) -> dict[str, Any]:
        """The entries of the file, over those of the files that it includes. Nothing that they name is imported."""
        merged: dict[str, Any] = {}
        for own in reversed(included(self.path).values()):
            merged |= own
        return merged

    def code(self) -> str:
        """Hash of lmms-eval's version, of the task's YAML files, and of the code of lmms-eval that they lead to."""
        root = lmms_folder().parent
        files: dict[str, Path] = {}
        for path, entries in included(self.path).items():
            files[f"yaml {path.name} {len(files)}"] = path
            for function in function_names(entries):
                name = function.rpartition(".")[0].replace(".", "/")
                beside, absolute = path.parent / f"{name}.py", root / f"{name}.py"
                module = beside if beside.is_file() else absolute
                if module.is_file():
                    files |= code_files(module, ".".join(module.relative_to(root).with_suffix("").parts))
        return digest_json([importlib.metadata.version("lmms-eval"), digest_files(files)], 64)


def find_lmms_task(name: str) -> LmmsTaskFile:
    """The YAML file of a task of lmms-eval's.

    Raises:
        UserError: lmms-eval is not installed, or has no such task.
    """
    if importlib.util.find_spec("lmms_eval") is None:
        message = (
            f"'{name}' is a task of lmms-eval, which is not installed: {INSTALL}, or without what only other models "
            f"need: {LIGHT}"
        )
        raise UserError(Problem(message, NAME))
    tasks, groups, tags = _index(lmms_folder())
    if name in tasks:
        return LmmsTaskFile(name, tasks[name])
    if name in groups or name in tags:
        raise UserError(
            Problem(f"'{name}' is a group of tasks; name one of them: {', '.join(lmms_members(name))}", NAME)
        )
    raise UserError(Problem(f"lmms-eval has no task '{name}'; {nearest(name, tasks)}", NAME))


def lmms_members(name: str) -> list[str]:
    """The tasks of a group or of a tag of lmms-eval's, each once; the name itself if it is neither."""
    if importlib.util.find_spec("lmms_eval") is None:
        return [name]  # looking the task up says what is missing
    tasks, groups, tags = _index(lmms_folder())
    if name in tasks or (name not in groups and name not in tags):
        return [name]
    members = member_names(read_file(groups[name])) if name in groups else tags[name]
    return list(dict.fromkeys(one for member in members if member != name for one in lmms_members(member))) or [name]


def lmms_folder() -> Path:
    """The folder of the package lmms_eval, which is not imported to find it."""
    found = importlib.util.find_spec("lmms_eval")
    return Path(next(iter((found.submodule_search_locations if found else None) or []))).resolve()


@functools.cache
def _index(folder: Path) -> tuple[dict[str, Path], dict[str, Path], dict[str, list[str]]]:
    """The files of all tasks by name, those of all groups, and the tasks that carry each tag."""
    tasks: dict[str, Path] = {}
    groups: dict[str, Path] = {}
    tags: dict[str, list[str]] = {}
    for path in sorted((folder / "tasks").rglob("*.yaml")):
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        if found := _TASK.search(text):
            tasks[found[1]] = path
            for tag in tags_of(text):
                tags.setdefault(tag, []).append(found[1])
        elif found := _GROUP.search(text):
            groups[found[1]] = path
    return tasks, groups, tags


def tags_of(text: str) -> list[str]:
    """The tags that a task's YAML file gives it, one or a list. Reading all files as YAML would take seconds.

    Args:
        text: the file.
    """
    found = _TAGS.search(text)
    return _TAG.findall(found[1].strip()) if found else []
