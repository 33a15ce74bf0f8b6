"""From run records to table rows. What a record says is text of a stranger's: the page escapes all of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from qapbench.records.record import ColumnScore, Record, Unparsed
from qapbench.records.tally import Tally

NONE = "none"


@dataclass(frozen=True)
class Score:
    """One accuracy, as fractions in [0, 1]; where `accuracy` is None, `reason` says why."""

    k: int | None = None
    n: int | None = None
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Versus:
    """A row against a reference, on all questions: the difference in accuracy, fractions.

    Attributes:
        row: the reference's place on the page; name: its name.
        p, q: of the test, and by Benjamini-Hochberg over all comparisons of the kind on the page.
        gained, lost: questions that only this row, or only the reference, answers right; None where unpaired.
    """

    row: int
    name: str
    difference: float
    low: float
    high: float
    p: float
    q: float
    gained: int | None = None
    lost: int | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table. `tokens` is what a run measured, `available` what there was to keep from.

    `rank` is shared by rows that cannot be told apart from the same better ones, among `among` rows on the same
    questions; `against` holds its references "dense" and "semantic"; `moved` says where pruning changed what it cannot.
    """

    kind: str = "run"
    name: str = ""
    model: str = ""
    quantization: str = ""
    pruner: str = NONE
    sensitivity: str = NONE
    fusion: str = NONE
    keep: int | float | None = None
    tokens: float | None = None
    tokens_min: float | None = None
    tokens_max: float | None = None
    kept: float | None = None
    merged: float | None = None
    available: float | None = None
    cells: dict[str, Score] = field(default_factory=dict)
    unparsed: Score = field(default_factory=Score)
    receipt: str = ""
    fallbacks: int = 0
    run_id: str = ""
    created: str = ""
    stand_in: bool = False
    rank: int | None = None
    among: int = 0
    against: dict[str, Versus] = field(default_factory=dict)
    moved: str = ""

    @property
    def position(self) -> float | None:
        """Where the chart puts the row: the measured tokens, or what was asked for where none were."""
        return next((value for value in (self.tokens, self.keep, self.available) if value is not None), None)


def counted(k: int, n: int) -> Score:
    """The cell of k correct answers of n."""
    tally = Tally(k, n)
    return Score(k, n, tally.accuracy, *tally.interval)


def clean(value: Any) -> Any:
    """The value as plain JSON data: string keys, no NaN, no lone surrogates; anything else as its text."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {clean(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return clean(str(value))


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def sequence(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def text(value: Any) -> str:
    return "" if value is None else str(value)


def number(value: Any) -> int | float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def item_label(value: Any) -> str:
    """`cdpruner`; `convex (semantic 0.7)` for `{convex: {semantic: 0.7}}`; `none` for nothing."""
    if isinstance(value, dict) and len(value) == 1:
        name, params = next(iter(value.items()))
        inner = ", ".join(f"{key} {item}" for key, item in mapping(params).items())
        return f"{name} ({inner})" if inner else text(name)
    return text(value) or NONE


def quantization_label(quantize: Any, dtype: Any = None) -> str:
    """`rtn W4A4 g128`, with the scope where it is not the language model alone; `none (bfloat16)`."""
    spec = mapping(quantize)
    if not spec:
        label = text(quantize)
        return label or (NONE if dtype in (None, "auto") else f"{NONE} ({dtype})")
    weights, activations = mapping(spec.get("weights")), mapping(spec.get("activations"))
    bits = "".join(
        f"{letter}{text(part.get('bits')) or '?'}" if part else f"{letter}16"
        for letter, part in (("W", weights), ("A", activations))
    )
    groups = [text(part.get("group_size")) for part in (weights, activations) if part.get("group_size")]
    parts = [item_label(spec.get("method")), bits, *(f"g{group}" for group in dict.fromkeys(groups))]
    scope = [text(name) for name in sequence(spec.get("scope"))]
    if scope and scope != ["language"]:
        parts.append("on " + "+".join(scope))
    return " ".join(parts)


def _score(column: ColumnScore) -> Score:
    """The score of a column; counts come first: a rate beside k and n is derived again."""
    if column.unavailable is not None:
        return Score(reason=column.unavailable)
    if column.k is not None and column.n:
        derived = counted(column.k, column.n)
        if column.low is None or column.high is None:
            return derived
        return Score(column.k, column.n, derived.accuracy, column.low, column.high)
    value = column.accuracy if column.accuracy is not None else column.mean
    share = value if value is not None and 0 <= value <= 1 else None
    reason = "" if share is not None else "the record holds no result"
    return Score(column.k, column.n, share, column.low, column.high, reason)


def _unparsed(unparsed: Unparsed) -> Score:
    return counted(unparsed.k, unparsed.n) if unparsed.n else Score(reason="no question was asked")


def from_record(record: Record) -> Row:
    """The row of one record."""
    spec, tokens, prune = record.spec, record.tokens, mapping(record.spec.get("prune"))
    labels = record.labels  # without the parameters that are at their defaults
    return Row(
        name=record.name,
        model=text(spec.get("model")),
        quantization=quantization_label(spec.get("quantize"), spec.get("dtype")),
        pruner=labels.get("pruner") or item_label(prune.get("method")),
        sensitivity=labels.get("sensitivity") or item_label(prune.get("sensitivity")),
        fusion=labels.get("fusion") or item_label(prune.get("fusion")),
        keep=number(prune.get("keep")),
        tokens=tokens.mean if tokens else None,
        tokens_min=tokens.min if tokens else None,
        tokens_max=tokens.max if tokens else None,
        kept=tokens.kept if tokens else None,
        merged=tokens.merged if tokens else None,
        available=tokens.available if tokens else None,
        cells={column.name: _score(column) for column in record.scores.columns},
        unparsed=_unparsed(record.scores.unparsed),
        receipt=record.receipt.summary,
        fallbacks=len(record.receipt.fallbacks),
        run_id=record.run_id,
        created=record.created,
        stand_in=bool(stand_in_notes(record)),
    )


def stand_in_notes(record: Record) -> list[str]:
    """The record's notes that say its model or data is an embedded stand-in."""
    return [note for note in record.notes if "stand-in" in note.lower()]


def column_names(rows: Iterable[Row]) -> list[str]:
    """The union of the rows' columns; a new one goes where its own row has it, after the one before it."""
    names: list[str] = []
    for row in rows:
        after = -1
        for name in row.cells:
            if name not in names:
                names.insert(after + 1, name)
            after = names.index(name)
    return names
