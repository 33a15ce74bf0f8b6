"""Reads YAML as plain data of JSON's types, bounded in size, with the line of every key and item."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from qapbench.errors import Problem, UserError

from .text import shown, unfit

Lines = dict[tuple[str | int, ...], int]
"""Path of a key or item in a YAML file -> its line, counted from 1. The empty path is the whole file."""
BYTES = 1 << 18  # size of a spec file: some two thousand rows
DEPTH = 32  # levels of nesting, where aliases are written out
VALUES = 20_000  # keys and values, where aliases are written out
NUMBER = 100  # characters of a whole number; 64 bits have fewer, also in binary
TYPES = "text, numbers, true and false, null, lists and mappings"
_TAG = "tag:yaml.org,2002:"
_SCALARS = {f"{_TAG}{name}" for name in ("str", "int", "float", "bool", "null")}


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """Read a YAML mapping, and the line of every key and item in it.

    Raises:
        UserError: the file is not valid YAML or not a mapping, gives a key twice, is larger than a spec can be, or
            holds values that JSON has no type for.
    """
    try:
        encoded = path.read_bytes() if path.stat().st_size <= BYTES else None
    except OSError as error:
        raise UserError(Problem(f"cannot be read: {error.strerror}", (path.name,))) from None
    if encoded is None:
        raise UserError(Problem(f"larger than a spec can be ({BYTES >> 10} KiB)", (path.name,), 1))
    try:
        text = encoded.decode()
    except UnicodeDecodeError as error:
        line = encoded[: error.start].count(b"\n") + 1
        raise UserError(Problem("not valid YAML: not UTF-8 text", (path.name,), line)) from None
    node = _composed(text, (path.name,))
    if not isinstance(node, yaml.MappingNode):
        found = "an empty file" if node is None else "a list" if isinstance(node, yaml.SequenceNode) else "a text"
        raise UserError(Problem(f"a spec is a mapping (`model: ...`), got {found}", (path.name,), 1))
    reader = _Reader()
    data = reader.whole(node)
    return data, reader.lines


def read_value(text: str) -> Any:
    """The value that YAML text stands for, such as that of a `--set` argument.

    Raises:
        UserError: it is not valid YAML, or holds values that JSON has no type for.
    """
    if len(text) > BYTES:
        raise UserError("larger than a spec can be")
    node = _composed(text, ())
    try:
        return None if node is None else _Reader().whole(node)
    except UserError as error:
        raise UserError([Problem(problem.message, problem.where) for problem in error.problems]) from None


def _composed(text: str, where: tuple[str, ...]) -> yaml.Node | None:
    """The tree of nodes that YAML text stands for; None if it holds nothing."""
    try:
        return yaml.compose(text, Loader=_Composer)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        message = f"not valid YAML: the character U+{ord(text[error.position]):04X} cannot be part of it"
        raise UserError(Problem(message, where, line)) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(filter(None, (error.context, error.problem)))
        raise UserError(Problem(f"not valid YAML: {what}", where, mark.line + 1 if mark else 1)) from None
    except (yaml.YAMLError, ValueError) as error:  # a number of a directive or of an escape that Python refuses
        raise UserError(Problem(f"not valid YAML: {error}", where, 1)) from None


class _Composer(yaml.SafeLoader):
    """YAML's safe loader as far as nodes, of which a bounded depth is read.

    Dates are not resolved: JSON has no type for them, so `2026-11-22` stays text.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.depth == DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {DEPTH} levels", mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


_Composer.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{_TAG}timestamp", f"{_TAG}value")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Reader:
    """Makes plain data of nodes, and collects lines and mistakes.

    Attributes:
        lines: line of every key and item that was read.
    """

    def __init__(self) -> None:
        self.lines: Lines = {}
        self._problems: list[Problem] = []
        self._values = self._depth = 0
        self._scalars = yaml.constructor.SafeConstructor()

    def whole(self, node: yaml.Node) -> Any:
        """The value of a root node.

        Raises:
            UserError: something in it is wrong; every mistake is listed.
        """
        self.lines[()] = _line(node)
        value = self._value(node, ())
        if self._problems:
            raise UserError(self._problems)
        return value

    def _value(self, node: yaml.Node, path: tuple[str | int, ...]) -> Any:
        self._values += 1
        if self._values > VALUES or self._depth > DEPTH:
            limit = f"more than {VALUES} values" if self._values > VALUES else f"nested deeper than {DEPTH} levels"
            message = f"{limit}, where aliases are written out; does an alias contain itself?"
            raise UserError([*self._problems, Problem(message, path[:1], _line(node))])
        self._depth += 1
        value = self._plain(node, path)
        self._depth -= 1
        return value

    def _plain(self, node: yaml.Node, path: tuple[str | int, ...]) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            for index, item in enumerate(node.value):
                self.lines[(*path, index)] = _line(item)
            return [self._value(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self._scalar(node, path)
        tag = node.tag.replace(_TAG, "!!")
        return self._wrong(f"of type {shown(tag)}, but a spec holds only {TYPES}", path, node)

    def _mapping(self, node: yaml.MappingNode, path: tuple[str | int, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.value:
            if key.tag == f"{_TAG}merge":
                several = isinstance(value, yaml.SequenceNode)
                for merged in reversed(value.value) if several else [value]:  # the first of several wins
                    if isinstance(merged, yaml.MappingNode):
                        found |= self._value(merged, path) or {}
                    else:
                        self._wrong("`<<` takes a mapping, or a list of mappings", path, key)
        own: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == f"{_TAG}merge":
                continue
            if not isinstance(key, yaml.ScalarNode):
                self._wrong("a key is a text, not a list or a mapping", path, key)
                continue
            below, line = (*path, key.value), _line(key)
            if (why := unfit(key.value)) is not None:
                self._wrong(f"the key {why}", path, key)
                continue
            if key.value in own:
                self._problems.append(Problem(f"given twice, first in line {own[key.value]}", below, line))
            own[key.value] = self.lines[below] = line
            found[key.value] = self._value(value, below)
        return found

    def _scalar(self, node: yaml.ScalarNode, path: tuple[str | int, ...]) -> Any:
        text, kind = node.value, node.tag.removeprefix(_TAG)
        if kind == "str":
            why = unfit(text)
            return text if why is None else self._wrong(why, path, node)
        if kind == "int" and len(text) > NUMBER:
            return self._wrong("a whole number of more than 64 bits", path, node)
        try:
            value = getattr(self._scalars, f"construct_yaml_{kind}")(node)
        except (ValueError, KeyError, IndexError, OverflowError):
            return self._wrong(f"{shown(text)} is not of type {kind}", path, node)
        if kind == "int" and not -(2**63) <= value < 2**64:
            return self._wrong("a whole number of more than 64 bits", path, node)
        if kind == "float" and not math.isfinite(value):
            return self._wrong(f"{shown(text)} is not a finite number", path, node)
        return value

    def _wrong(self, message: str, path: tuple[str | int, ...], node: yaml.Node) -> None:
        self._problems.append(Problem(message, path or (".",), _line(node)))


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
