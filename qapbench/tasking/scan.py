"""Finds the names of tasks and groups in a folder of lm-eval's YAML files, without importing lm-eval.

lm-eval parses every file, and for each anew the files that it includes, which takes some 20 seconds for the 14,000 that
come with it. Names hang on five keys at the top of a file, and nearly always stand in one line, so only those are read.
`python -m benchmarks.task_index` compares the result with lm-eval's own.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

KEYS = ("task", "group", "tag", "class", "include")
IGNORED = {"__pycache__", ".ipynb_checkpoints"}
_KEY = re.compile(rb"^([\"']?)(task|group|tag|class|include)\1[ \t]*:(?=\s|\Z)", re.MULTILINE)
_OTHER = re.compile(rb"^(?!\Z|[ \t\r\n#]|([\"']?)[\w-]+\1[ \t]*:(?=\s|\Z)|-[ \r\n])", re.MULTILINE)
"""The start of a line at the margin that is no key, no item of a list and no comment."""
_WORD = re.compile(rb"[./_]*[A-Za-z][\w./+-]*|([\"'])[\w ./+-]+\1")
_MARGIN = re.compile(rb"^[\w\"']", re.MULTILINE)
_RESERVED = {b"true", b"false", b"yes", b"no", b"on", b"off", b"null", b"y", b"n", b".inf", b".nan"}
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):
    """YAML's safe loader, to which lm-eval's `!function module.name` is text."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@dataclass
class Entry:
    """A name in the index.

    Attributes:
        path: path of the YAML file; "" for a tag, which is a group that other files name.
        config: the values of KEYS in that file and those that it includes.
        tags: names of the tasks that carry this tag.
    """

    path: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    tags: set[str] = field(default_factory=set)

    @property
    def is_task(self) -> bool:
        """Whether the name is that of a single task."""
        return bool(self.path) and ("class" in self.config or "group" not in self.config)


def scan(folder: Path) -> dict[str, Entry]:
    """The names in a folder, as lm-eval's `TaskManager` finds them.

    Of several files with one name the first counts, in the order of their paths. A file that lm-eval could not read is
    left out.
    """
    found: dict[str, Entry] = {}
    known: dict[str, dict[str, Any]] = {}
    for path in _files(folder):
        try:
            config = _config(path, known, ())
            name = config["task" if "class" in config or "group" not in config else "group"]
            if not isinstance(name, str) or name in found:
                continue
        except (KeyError, TypeError, ValueError, OSError, yaml.YAMLError):
            continue
        entry = found[name] = Entry(path, config)
        if entry.is_task and (tags := config.get("tag")):
            for tag in tags if isinstance(tags, list) else [tags]:
                found.setdefault(str(tag), Entry()).tags.add(name)
    return found


def _files(folder: Path) -> list[str]:
    names: list[str] = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in IGNORED]
        names += [f"{place}/{name}" for name in files if name.endswith(".yaml")]
    return sorted(names)


def _config(path: str, known: dict[str, dict[str, Any]], including: tuple[str, ...]) -> dict[str, Any]:
    """The values of KEYS in a file, over those of the files that it includes.

    Args:
        path: the file.
        known: files that were read before; this one is added.
        including: the files that include it.

    Raises:
        ValueError: a file includes itself, or is no mapping.
        OSError, yaml.YAMLError: a file cannot be read.
    """
    if path in including:
        raise ValueError(f"{path} includes itself")
    if path not in known:
        own = _values(Path(path).read_bytes())
        merged: dict[str, Any] = {}
        if "include" in own:
            named = own.pop("include")
            for name in named if isinstance(named, list) else [named]:
                included = os.path.normpath(Path(path).parent / name)
                merged |= _config(included, known, (*including, path))
        known[path] = merged | own
    return known[path]


def _values(text: bytes) -> dict[str, Any]:
    """The values of KEYS in the text of a file."""
    if _OTHER.search(text):
        whole = yaml.load(text, Loader=_Loader)  # safe: _Loader makes plain data only
        if not isinstance(whole, dict):
            raise ValueError("no mapping")
        return {key: whole[key] for key in KEYS if key in whole}
    found: dict[str, Any] = {}
    for key in _KEY.finditer(text):
        first, _, rest = text[key.end() :].partition(b"\n")
        word = first.partition(b" #")[0].strip()
        if _WORD.fullmatch(word) and word.lower() not in _RESERVED and rest[:1] not in (b" ", b"\t", b"-"):
            found[key[2].decode()] = word.strip(b"\"'").decode()
        else:
            stop = _MARGIN.search(rest)
            block = text[key.start() : key.end()] + first + b"\n" + rest[: stop.start() if stop else len(rest)]
            found |= yaml.load(block, Loader=_Loader)  # safe: as above
    return found
