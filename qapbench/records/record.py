"""The record of a run: a typed and versioned file, read with an upgrade from earlier versions."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from qapbench.errors import Problem, UserError
from qapbench.methods.parameters import problems_of

from .parts import (
    ColumnScore,
    CostRecord,
    Environment,
    Part,
    ReceiptRecord,
    ScoreTable,
    Stopped,
    TaskPart,
    TaskRecord,
    Timing,
    TokenCounts,
    Unanswered,
)
from .store import checksum, write_json

SCHEMA: Literal[3] = 3
"""Version of the record that this package writes."""
CHECK = "check"  # entry of the file with the checksum of all others
RECORD, SCORED = "record.json", "scored.jsonl"
MOST = 20  # largest number of problems that are listed for one file


class NewerRecordError(UserError):
    """A newer qapbench wrote a record."""


class Record(Part):
    """The record of one run.

    Attributes:
        schema_version: version of this schema; records of earlier versions are upgraded while they are read.
        run_id: hash of what was run and of the content that it read (docs/identity.md).
        text_key: hash of what its answers to questions without an image depend on.
        name: name of the run, with a remark if it was stopped.
        created: time in ISO 8601, UTC.
        spec: the spec as plain data, so that reading a record runs no plugin.
        labels: the pruner, sensitivity and fusion, as a table shows them.
        task: the task; None in some records of earlier versions.
        scores: the scores.
        tokens: measured token counts; None if no question has an image.
        receipt: what compression really did.
        environment: the machine and the settings.
        fingerprints: content hashes of everything that the run read, and versions of libraries that affect numbers.
        files: SHA-256 of answers.jsonl, scored.jsonl and receipt.json; empty in records of earlier versions.
        timing: the cost.
        notes: what a reader of the numbers has to know.
        stopped: why the run was stopped; None if it answered all questions.
        parts: the results by task, if the run asked several. `scores` then has one column per task, which is the task's
            score.
        unanswered: the questions that could not be asked; the scores are of the others.
        cost: what one prompt costs; None in records of earlier versions, and where the model's kind has no cost model.
    """

    schema_version: Annotated[Literal[3], Field(alias="schema")] = 3
    run_id: str
    text_key: str = ""
    name: str
    created: str
    spec: dict[str, Any]
    labels: dict[str, str] = Field(default_factory=dict)
    task: TaskRecord | None = None
    scores: ScoreTable
    tokens: TokenCounts | None = None
    receipt: ReceiptRecord
    environment: Environment = Environment()
    fingerprints: dict[str, str]
    files: dict[str, str] = Field(default_factory=dict)
    timing: Timing
    notes: list[str] = Field(default_factory=list)
    stopped: Stopped | None = None
    parts: list[TaskPart] | None = None
    unanswered: list[Unanswered] = Field(default_factory=list)
    cost: CostRecord | None = None

    @property
    def score(self) -> ColumnScore | None:
        """The column that is the task's score; None if there are no columns."""
        named = self.scores.column(self.task.score) if self.task and self.task.score else None
        return named or next(reversed(self.scores.columns), None)

    @property
    def asked_blank(self) -> bool:
        """Whether the questions were asked with blank images."""
        task = self.spec.get("task")
        return isinstance(task, dict) and task.get("blank_images") is True

    def to_json(self) -> dict[str, Any]:
        """The record as plain data, as it is stored. Fields without a value are left out, and an empty `unanswered`."""
        data = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        if not self.unanswered:
            del data["unanswered"]
        return data

    def made_alike(self, other: Record) -> bool:
        """Whether two records say the same of one run, apart from when, where and how fast it was made."""
        apart = {"created": "", "environment": Environment(), "timing": Timing(seconds=0)}
        return self.model_copy(update=apart) == other.model_copy(update=apart)

    def named(self, name: str) -> Record:
        """The record under another name. If the run was stopped, the name says so."""
        why = self.stopped
        return self.model_copy(update={"name": f"{name} (stopped: {why.asked} of {why.of})" if why else name})

    def __getitem__(self, key: str) -> Any:
        """Deprecated. Records were dictionaries in version 0.1; this works for one more version, with a warning."""
        _warn_of_keys()
        return self._as_in_0_1()[key]

    def _as_in_0_1(self) -> dict[str, Any]:
        """The record as version 0.1 had it: no key without a value, but inside of those every key."""
        data = self.model_dump(mode="json", by_alias=True)
        return {key: value for key, value in {**data, "tokens": data["tokens"] or {}}.items() if value is not None}

    def __contains__(self, key: object) -> bool:
        return key in self._as_in_0_1()

    def get(self, key: str, default: Any = None) -> Any:
        """Deprecated like `record[key]`, but with a default for a missing key."""
        _warn_of_keys()
        return self._as_in_0_1().get(key, default)


def _warn_of_keys() -> None:
    """Tell the caller of a method of `Record` that records are no dictionaries any more."""
    warnings.warn("a record is typed now: read record.name, not record['name']", DeprecationWarning, stacklevel=3)


def upgraded(data: Mapping[str, Any]) -> dict[str, Any]:
    """Stored data of this or an earlier schema, in the present schema.

    Schema 1 (qapbench 0.1) wrote `{}` for the tokens if no question had an image, and null for some missing values.
    Schemas 1 and 2 had no `files`.

    Raises:
        UserError: a newer qapbench wrote the data, or they name no schema.
    """
    schema = data.get("schema")
    if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
        raise UserError(Problem(f"no version of a record: {schema!r}", ("schema",)))
    if schema > SCHEMA:
        message = f"version {schema} was written by a newer qapbench; this one reads up to {SCHEMA}: upgrade qapbench"
        raise NewerRecordError(Problem(message, ("schema",)))
    return {**data, "schema": SCHEMA, "tokens": data.get("tokens") or None}


def parse_record(data: Any) -> Record:
    """A record from plain data, upgraded if an earlier version wrote it.

    Raises:
        UserError: fields are missing or wrong.
    """
    if isinstance(data, Record):
        return data
    if not isinstance(data, Mapping):
        raise UserError(f"a record is a mapping, got {type(data).__name__}")
    try:
        return Record.model_validate(upgraded(data))
    except ValidationError as error:
        raise UserError(problems_of(error, Record)[:MOST]) from None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: the file cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes().decode())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not a JSON file") from None


def read_record(place: Path) -> Record:
    """Read a record.

    Args:
        place: the run's folder, or the record's file.

    Raises:
        UserError: there is no record, it is damaged, or a newer version wrote it.
    """
    path = place / RECORD if place.is_dir() else place
    data = read_json(path)
    try:
        if isinstance(data, dict):
            stated = data.pop(CHECK, None)
            upgraded(data)  # what a newer version wrote is told as that, whatever its checksum is of
            if stated not in (None, _checksum(data)):
                raise UserError("damaged: the content does not have the checksum that stands in it")
        return parse_record(data)
    except UserError as error:
        raise type(error)([Problem(f"{path}: {problem}") for problem in error.problems]) from None


def write_record(folder: Path, record: Record) -> None:
    """Write a run's record, with a checksum of its content."""
    data = record.to_json()
    write_json(folder / RECORD, {**data, CHECK: _checksum(data)})


def _checksum(data: dict[str, Any]) -> str:
    """Checksum of plain data, whatever the white space of the file that they were read from."""
    return checksum(json.dumps(data, sort_keys=True).encode())
