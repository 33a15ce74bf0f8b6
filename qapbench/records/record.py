"""The record of a run: typed, versioned, and read back with an upgrade from earlier versions."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from qapbench.errors import Problem, UserError
from qapbench.methods.parameters import problems_of
from qapbench.receipt import ReceiptFields

SCHEMA: Literal[2] = 2
"""Version of the record that this package writes."""
RECORD, SCORED = "record.json", "scored.jsonl"
MOST = 20  # problems of one file that are listed
Count = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """Base of what is stored: frozen; fields that this version does not know are ignored."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)


class ColumnScore(Part):
    """One column of the task's table.

    Attributes:
        k, n: right answers and questions, where each question is right or wrong.
        accuracy, stderr, low, high: as fractions; `low` and `high` are Wilson's 95 % interval.
        mean: of a metric that is not right or wrong.
        unavailable: why there is no value.
    """

    name: Annotated[str, Field(min_length=1)]
    k: Count | None = None
    n: Count | None = None
    accuracy: FiniteFloat | None = None
    stderr: FiniteFloat | None = None
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    mean: FiniteFloat | None = None
    unavailable: str | None = None

    @model_validator(mode="after")
    def _counts(self) -> ColumnScore:
        if self.k is not None and self.n is not None and self.k > self.n:
            raise ValueError(f"{self.k} right answers of {self.n} questions")
        return self


class Unparsed(Part):
    """Answers that no rule of the parser could read: k of n questions, and their share."""

    k: Count
    n: Count
    rate: FiniteFloat = 0.0


class ScoreTable(Part):
    """The scores of a run.

    Attributes:
        columns: in the order of the task's table; the last one is the overall accuracy.
        missing: questions without a stored output, which count as wrong.
        unknown: stored outputs for questions that the data do not have.
    """

    columns: list[ColumnScore]
    unparsed: Unparsed
    missing: Count = 0
    unknown: Count = 0

    def column(self, name: str) -> ColumnScore | None:
        """The column of that name; None where the table has none."""
        return next((column for column in self.columns if column.name == name), None)


class TaskRecord(Part):
    """The task that was asked: its name, how many questions, and the accuracy of guessing (None where unknown)."""

    name: str
    questions: Count
    chance: FiniteFloat | None = None


class TokenCounts(Part):
    """Visual tokens per image, as measured.

    Attributes:
        images: images that were counted.
        available: tokens that there were to keep from; the mean over images, as all others here.
        mean, min, max: tokens that the language model saw, kept and merged together.
        kept, merged: the two parts of `mean`.
        layer_mean: mean over the decoder's layers, where tokens are dropped between them.
        separators: tokens of the model's own, such as new lines between rows of tiles; not in the budget.
    """

    images: Count | None = None
    available: FiniteFloat
    mean: FiniteFloat
    min: FiniteFloat
    max: FiniteFloat
    kept: FiniteFloat
    merged: FiniteFloat
    layer_mean: FiniteFloat | None = None
    separators: FiniteFloat | None = None


class ReceiptRecord(ReceiptFields):
    """A receipt as it is stored, with its one-line summary."""

    model_config = ConfigDict(frozen=True)

    summary: str


class Environment(BaseModel):
    """Where a result was made. Versions of packages stand beside these fields, under the packages' names.

    Attributes:
        git: commit of the checkout that ran, "(dirty)" behind it where it was changed; None for an installed wheel.
        dtype: of the model's weights.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    python: str | None = None
    platform: str | None = None
    device: str | None = None
    threads: int | None = None
    git: str | None = None
    batch_size: int | None = None
    workers: int | None = None
    engine: str | None = None
    dtype: str | None = None
    image_processor: str | None = None


class Timing(Part):
    """What the session that finished the run took: not the run's identity, and different each time.

    Attributes:
        seconds: this run's share of the time spent, and `stages` the same by stage.
        questions, computed: questions answered in that session, and those that no other run had answered before.
        peak_memory_mb, peak_gpu_memory_mb: of the process.
    """

    seconds: FiniteFloat
    questions: Count = 0
    computed: Count = 0
    questions_per_second: FiniteFloat = 0.0
    stages: dict[str, FiniteFloat] = Field(default_factory=dict)
    peak_memory_mb: Count | None = None
    peak_gpu_memory_mb: Count | None = None


class Stopped(Part):
    """Why a run ended with a part of its questions (`--fast`).

    Attributes:
        by: name of the run that was better; lost, won: questions that only that run, and only this run had right.
        p, level: one-sided exact McNemar p, which had to be below `level`.
        asked, of: questions answered, of how many.
        bound: all of this as one sentence.
    """

    by: str
    lost: Count
    won: Count
    p: FiniteFloat
    level: FiniteFloat
    asked: Count
    of: Count
    bound: str


class Record(Part):
    """One finished run.

    Attributes:
        run_id: hash of what was run and of the content that it read (docs/identity.md).
        text_key: hash of what its answers to questions without an image depend on.
        created: ISO 8601, UTC.
        spec: as it was run, as plain data: reading it runs no plugin.
        labels: the pruner, sensitivity and fusion as a table shows them.
        tokens: None where no question has an image.
        fingerprints: content hashes of everything that the run read, and versions of libraries that move numbers.
        notes: what a reader of the numbers has to know.
        stopped: None for a run that answered everything.
    """

    schema_version: Annotated[Literal[2], Field(alias="schema")] = 2
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
    timing: Timing
    notes: list[str] = Field(default_factory=list)
    stopped: Stopped | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data as it is stored; fields without a value are left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)

    def named(self, name: str) -> Record:
        """The record under a run's name; where the run stopped early, the name says so wherever it is shown."""
        why = self.stopped
        return self.model_copy(update={"name": f"{name} (stopped: {why.asked} of {why.of})" if why else name})

    def __getitem__(self, key: str) -> Any:
        """Version 0.1 had records as dictionaries; this works for one more version and warns."""
        warnings.warn("a record is typed now: read record.name, not record['name']", DeprecationWarning, stacklevel=2)
        return self.to_json()[key]

    def __contains__(self, key: object) -> bool:
        return key in self.to_json()

    def get(self, key: str, default: Any = None) -> Any:
        """As `record[key]`, deprecated alike."""
        return self[key] if key in self else default  # noqa: SIM401 (it is no dictionary)


def upgraded(data: Mapping[str, Any]) -> dict[str, Any]:
    """Stored data of any earlier schema as data of the present one.

    Schema 1 (qapbench 0.1) wrote `{}` for tokens where no image was asked about, and null for some absent values.

    Raises:
        UserError: a newer qapbench wrote it, or it says no schema.
    """
    schema = data.get("schema")
    if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
        raise UserError(Problem(f"no version of a record: {schema!r}", ("schema",)))
    if schema > SCHEMA:
        message = f"version {schema} was written by a newer qapbench; this one reads up to {SCHEMA}: upgrade qapbench"
        raise UserError(Problem(message, ("schema",)))
    return {**data, "schema": SCHEMA, "tokens": data.get("tokens") or None}


def parse_record(data: Any) -> Record:
    """A record from plain data, upgraded where an earlier version wrote it.

    Raises:
        UserError: every field that is missing or wrong.
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
    """What a JSON file holds.

    Raises:
        UserError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not a JSON file") from None


def read_record(place: Path) -> Record:
    """The record in a run's folder, or of a file.

    Raises:
        UserError: there is none, it is damaged, or a newer version wrote it.
    """
    path = place / RECORD if place.is_dir() else place
    data = read_json(path)
    try:
        return parse_record(data)
    except UserError as error:
        raise UserError([Problem(f"{path}: {problem}") for problem in error.problems]) from None
