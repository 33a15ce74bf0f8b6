"""Reads lm-eval's YAML files of tasks. lm-eval is not imported, and nothing that a file names is run."""

from __future__ import annotations

import copy
import functools
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


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    """What a file's text says. A run looks at its task's files some five times, and PyYAML takes long to parse them."""
    return yaml.load(text, Loader=_Reader)  # safe: _Reader makes plain data only


def read_file(path: Path) -> dict[str, Any]:
    """The entries of one file, without those of the files that it includes.

    Raises:
        UserError: it cannot be read, or is not a YAML mapping.
    """
    try:
        data = copy.deepcopy(_parsed(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML lets through what Python raises on a value (a month of 13, `!!bool z`, numbers of 5,000 digits).
        raise UserError(f"{path}: not valid YAML ({first_line(error)})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a task's YAML is a mapping, got {type(data).__name__}")
    return data


def read_config(path: Path) -> dict[str, Any]:
    """The entries of a file, merged over those of the files that it includes.

    Raises:
        UserError: as `included`, or `metadata` is no mapping.
    """
    merged: dict[str, Any] = {}
    for file, own in reversed(included(path).items()):
        if not isinstance(own.get("metadata") or {}, dict):
            raise UserError(f"{file}: metadata: expected a mapping, got {type(own['metadata']).__name__}")
        merged = {**merged, **own, "metadata": {**(merged.get("metadata") or {}), **(own.get("metadata") or {})}}
    merged.pop("include", None)
    return merged


def included(path: Path) -> dict[Path, dict[str, Any]]:
    """A file and all files that it includes, each with its own entries.

    Raises:
        UserError: as `read_file`, the files include each other, or `include` names no files.
    """
    found: dict[Path, dict[str, Any]] = {}
    waiting = [(path, "")]
    while waiting:
        given, by = waiting.pop()
        file = given.resolve()
        if file in found:
            raise UserError(f"{path}: {file.name} is included twice")
        try:
            found[file] = read_file(file)
        except UserError as error:
            raise UserError(f"{by}{error}") from None
        named = found[file].get("include") or []
        names = [named] if isinstance(named, str) else named
        if not isinstance(names, list) or not all(isinstance(name, str) and "\0" not in name for name in names):
            raise UserError(f"{file}: include: expected a path or a list of paths")
        waiting += [(file.parent / name, f"{file}: include: ") for name in names]
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
    """All names that follow `!function` in a YAML file's entries. What aliases repeat is looked at once."""
    names: list[FunctionName] = []
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, FunctionName):
            names.append(value)
        elif isinstance(value, dict | list) and id(value) not in seen:
            seen.add(id(value))
            waiting += reversed(list(value.values()) if isinstance(value, dict) else value)
    return names
