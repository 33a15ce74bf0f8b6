"""The spec of several runs in one file, which vary by `matrix` and `cases` over dotted keys."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from qapbench.errors import Problem, UserError
from qapbench.methods.parameters import problems_of

from .run_spec import Strict

RUNS = 2000  # of one file
PARTS = 16  # of a dotted key
SENSITIVITY, FUSION = "prune.sensitivity", "prune.fusion"


class SweepSpec(Strict):
    """Several runs: fields that they share, and keys that vary.

    `matrix: {prune.keep: [128, 32]}` combines all values of its keys. `cases: {label: {dotted.key: value}}` adds named
    rows. With both, every case is combined with the whole matrix. A value of null removes the key; a case that removes
    a section is not combined with keys of the matrix below it, so that `dense: {prune: null}` is one row. A file with
    neither is a sweep of one run.

    Attributes:
        base: fields that all runs share. In a file they stand beside `matrix` and `cases`.
        matrix: dotted key -> values.
        cases: label -> dotted key -> value.
    """

    base: dict[str, Any]
    matrix: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    cases: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _split(cls, data: Any) -> Any:
        """Separate `matrix` and `cases` of a file from the shared fields."""
        if not isinstance(data, dict) or "base" in data:
            return data
        varying = {key: data[key] for key in ("matrix", "cases") if data.get(key) is not None}
        return {"base": {k: v for k, v in data.items() if k not in ("matrix", "cases")}, **varying}

    @property
    def name(self) -> str:
        """Name that the runs' own names start with, unless a case's label does."""
        return str(self.base.get("name", "run"))

    @classmethod
    def parse(cls, data: Any) -> SweepSpec:
        """Validate the keys that vary. The runs are validated one by one, not here.

        Raises:
            UserError: the sweep has mistakes; all of them are listed.
        """
        try:
            sweep = cls.model_validate(data)
            varied: list[tuple[str, ...]] = [("matrix", key) for key in sweep.matrix]
            varied += [("cases", label, key) for label, changes in sweep.cases.items() for key in changes]
            problems = []
            for where in varied:
                if where[-1].split(".")[0] == "plugins":
                    problems.append(Problem("plugins belong to the whole file, not to some of its runs", where))
                elif where[-1].count(".") >= PARTS:
                    problems.append(Problem(f"a dotted key of more than {PARTS} parts", where))
            count = sum(math.prod(map(len, sweep._crossing(case).values())) for case in sweep.cases.values() or [{}])
            if count > RUNS:
                message = f"{count if count < 10**9 else 'more than 10^9'} runs, of which a file can have {RUNS}"
                problems.append(Problem(message, ("matrix",) if sweep.matrix else ("cases",)))
            if problems:
                raise UserError(problems)
            return sweep
        except ValidationError as error:
            raise UserError(problems_of(error, cls)) from None

    def cells(self) -> list[dict[str, Any]]:
        """Plain data of each run's spec, in order, each with a name of its own. They are not validated."""
        return [cell for cell, _ in self.cells_with_changes()]

    def cells_with_changes(self) -> list[tuple[dict[str, Any], dict[str, tuple[str | int, ...]]]]:
        """The same, each with the path in the file at which every changed key was set."""
        cells = []
        rows: list[tuple[str | None, dict[str, Any]]] = [*self.cases.items()] or [(None, {})]
        for label, changes in rows:
            matrix = self._crossing(changes)
            for point in itertools.product(*(enumerate(values) for values in matrix.values())):
                crossed = {key: value for key, (_, value) in zip(matrix, point, strict=True)}
                places: dict[str, tuple[str | int, ...]] = {key: ("cases", str(label), key) for key in changes}
                places |= {key: ("matrix", key, at) for key, (at, _) in zip(matrix, point, strict=True)}
                cell = override(self.base, {**changes, **crossed})
                if self.matrix or self.cases:
                    varied = [f"{_shortest(key, self.matrix)}={_brief(value)}" for key, value in crossed.items()]
                    cell["name"] = " ".join([label or self.name, *varied])
                cells.append((cell, places))
        return cells

    def _crossing(self, case: dict[str, Any]) -> dict[str, list[Any]]:
        """The part of the matrix that a case is combined with: keys of which it removes no section.

        Args:
            case: dotted key -> value of the case.
        """
        removed = tuple(f"{key}." for key, value in case.items() if value is None)
        return {key: values for key, values in self.matrix.items() if not key.startswith(removed)}


def _brief(value: Any) -> str:
    """A value, for the name of a run: an item as its name and parameters, a text as it is, others as JSON."""
    if isinstance(value, dict) and len(value) == 1:
        name, params = next(iter(value.items()))
        inner = ",".join(f"{k}={_brief(v)}" for k, v in params.items()) if isinstance(params, dict) else params
        return f"{name}({inner})" if inner else str(name)
    return value if isinstance(value, str) else json.dumps(value)


def _shortest(key: str, keys: Iterable[str]) -> str:
    """The fewest last parts of a dotted key that no other key ends with."""
    parts = key.split(".")
    for start in range(len(parts) - 1, 0, -1):
        tail = ".".join(parts[start:])
        if sum(other == tail or other.endswith(f".{tail}") for other in keys) == 1:
            return tail
    return key


def override(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of `data` with dotted keys set.

    A key below a name opens it: with `prune.method.seed`, `method: random` becomes `method: {random: {}}`, and a task
    becomes `{name: NAME}`. A key below a list of tasks changes each of them. A sensitivity that is removed takes the
    fusion along, unless the changes name one: there is nothing left to fuse.

    Args:
        data: plain data of a spec.
        changes: dotted key -> value; None removes the key.
    """
    if changes.get(SENSITIVITY, "kept") is None and not any(key.startswith(FUSION) for key in changes):
        changes = {**changes, FUSION: None}
    out = _copied(data)
    for key, value in changes.items():
        *path, last = key.split(".")
        if path[:1] == ["task"] and isinstance(listed := out.get("task"), list):
            out["task"] = [override({"task": one}, {key: value})["task"] for one in listed]
            continue
        if value is None and not _reaches(out, path):
            continue
        node = out
        for part in path:
            below = node.get(part)
            if isinstance(below, str):
                below = {"name": below} if part == "task" else {below: {}}
            node[part] = below if isinstance(below, dict) else {}
            node = node[part]
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value
    return out


def _copied(value: Any) -> Any:
    """A copy of plain data. What is no mapping and no list is shared, since nothing changes it."""
    if isinstance(value, dict):
        return {key: _copied(below) for key, below in value.items()}
    return [_copied(below) for below in value] if isinstance(value, list) else value


def _reaches(data: Any, path: list[str]) -> bool:
    """Whether there is a mapping at this path."""
    for part in path:
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return isinstance(data, dict)
