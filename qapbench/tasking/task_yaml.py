"""Reads lm-eval's YAML files of tasks. lm-eval is not imported, and nothing that a file names is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qapbench.errors import UserError, first_line


class FunctionName(str):
    """The name `module.function` that follows `!function` in a task's YAML."""


class _Reader(yaml.SafeLoader):
    """YAML's safe loader, which reads lm-eval's `!function module.name` as a name."""


def _function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> FunctionName:
    return FunctionName(loader.construct_scalar(node))


_Reader.add_constructor("!function", _function)


def read_file(path: Path) -> dict[str, Any]:
    """The entries of one file, without those of the files that it includes.

    Raises:
        UserError: it cannot be read, or is not a YAML mapping.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Reader)  # safe: _Reader makes plain data only
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({first_line(error)})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a task's YAML is a mapping, got {type(data).__name__}")
    return data


def read_config(path: Path) -> dict[str, Any]:
    """The entries of a file, merged over those of the files that it includes.

    Raises:
        UserError: as `read_file`, or the files include each other.
    """
    merged: dict[str, Any] = {}
    for own in reversed(included(path).values()):
        merged = {**merged, **own, "metadata": {**(merged.get("metadata") or {}), **(own.get("metadata") or {})}}
    merged.pop("include", None)
    return merged


def included(path: Path) -> dict[Path, dict[str, Any]]:
    """A file and all files that it includes, each with its own entries.

    Raises:
        UserError: as `read_file`, or the files include each other.
    """
    found: dict[Path, dict[str, Any]] = {}
    waiting = [path]
    while waiting:
        file = waiting.pop().resolve()
        if file in found:
            raise UserError(f"{path}: {file.name} is included twice")
        found[file] = read_file(file)
        named = found[file].get("include") or []
        waiting += [file.parent / str(name) for name in ([named] if isinstance(named, str) else named)]
    return found


def member_names(group: dict[str, Any]) -> list[str]:
    """Names of the tasks and groups that a group lists; none if it changes one of them, which no name stands for.

    Args:
        group: entries of the group's YAML file.
    """
    listed = group.get("task")
    found: list[str] = []
    for member in [listed] if isinstance(listed, str) else listed or []:
        entries = {"task": member} if isinstance(member, str) else member if isinstance(member, dict) else {}
        if entries.keys() <= {"task", "task_alias"} and isinstance(entries.get("task"), str):
            found.append(entries["task"])
        elif "group" in entries and (inner := member_names(entries)):
            found += inner
        else:
            return []
    return found


def function_names(value: Any) -> list[FunctionName]:
    """All names that follow `!function` in a YAML file's entries."""
    if isinstance(value, FunctionName):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [name for entry in value for name in function_names(entry)] if isinstance(value, list) else []
