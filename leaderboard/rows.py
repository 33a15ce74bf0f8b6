"""Turns run records into rows of the table.

A record may come from a stranger, so the page escapes every text in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from qapbench.records.parts import ColumnScore, ScoreTable, Unparsed
from qapbench.records.record import Record
from qapbench.records.tally import Tally

NONE = "none"
LARGEST = 1e300
"""Largest number that a page shows: what is computed of a few of them is still finite."""
CONFIDENCE = ("ECE", "Brier")
"""Columns of a task that compares the likelihoods of options."""


@dataclass(frozen=True)
class Score:
    """One accuracy, as fractions in [0, 1].

    Attributes:
        k: number of right answers.
        n: number of questions.
        accuracy: the accuracy; None if it is not known.
        low: lower end of its 95 % interval.
        high: upper end of that interval.
        reason: why there is no accuracy.
        plain: a score that is no share of questions, such as a perplexity, as it is.
    """

    k: int | None = None
    n: int | None = None
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    plain: float | None = None


@dataclass(frozen=True)
class Versus:
    """The comparison of a row with a reference on all questions; differences are fractions.

    Attributes:
        row: index of the reference on the page.
        name: name of the reference.
        difference: accuracy of the row minus that of the reference.
        low: lower end of its 95 % interval.
        high: upper end of that interval.
        p: p-value of the test.
        q: the p-value after Benjamini-Hochberg correction over all comparisons with references of runs, or of published
            rows.
        gained: number of questions that only this row answers right; None if answers are not paired.
        lost: number of questions that only the reference answers right; None if answers are not paired.
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
class Standing:
    """How a row stands in one task, on a page with several.

    Attributes:
        rank: rank among the rows on the same questions of the task; None if there are no others.
        among: number of rows that were ranked together.
        against: "dense" and "semantic" -> comparison with that reference in the task's score.
    """

    rank: int | None = None
    among: int = 0
    against: dict[str, Versus] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The standing as plain data."""
        return {**vars(self), "against": {kind: vars(versus) for kind, versus in self.against.items()}}


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        kind: "run", or "paper" for a published row.
        name: name of the row.
        model: the model as its spec names it.
        quantization: the quantization in words.
        pruner: label of the pruner, or "none".
        sensitivity: label of the sensitivity metric, or "none".
        fusion: label of the fusion, or "none".
        keep: budget that was asked for.
        tokens: measured tokens per image, mean over images.
        tokens_min: smallest number of tokens of an image.
        tokens_max: largest number of tokens of an image.
        kept: the kept part of `tokens`.
        merged: the merged part of `tokens`.
        available: tokens per image before pruning.
        cells: name of a score column -> score.
        unparsed: answers that the parser could not read, as a score.
        receipt: one-line summary of the receipt.
        fallbacks: number of fallbacks.
        run_id: id of the run, or the table of the paper.
        created: time in ISO 8601, UTC.
        stand_in: whether the model or the data are an embedded stand-in.
        constructed: whether the model's weights were constructed and not trained.
        rank: rank among the rows on the same questions; rows share it if equally many rows are better and can be told
            apart.
        among: number of rows that were ranked together.
        against: "dense" and "semantic" -> comparison with that reference.
        moved: remark on answers that pruning cannot change, but that changed; "" if there are none.
        by_task: label of a task -> how the row stands in it, on a page on which some run asked several tasks. There no
            rank and no comparison is over all of them.
        relative: the relative average over tasks, on such a page.
        transparent: number of images with transparent pixels.
        too_long: number of questions whose prompts need more positions than the model was made for.
        unanswered: number of questions that could not be asked.
        left_out: number of questions that its rank and comparisons leave out, because not all rows were asked them.
        costs: what it costs, by the names of the cost columns.
        equal_cost: the cost that other rows have too, in words; "" if none has.
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
    constructed: bool = False
    rank: int | None = None
    among: int = 0
    against: dict[str, Versus] = field(default_factory=dict)
    moved: str = ""
    by_task: dict[str, Standing] = field(default_factory=dict)
    relative: Score | None = None
    transparent: int = 0
    too_long: int = 0
    unanswered: int = 0
    left_out: int = 0
    costs: dict[str, float] = field(default_factory=dict)
    equal_cost: str = ""

    def to_json(self) -> dict[str, Any]:
        """The row as plain data. What there is only on a page with several tasks is left out elsewhere."""
        cells = {name: vars(score) for name, score in self.cells.items()}
        against = {kind: vars(versus) for kind, versus in self.against.items()}
        data = {**vars(self), "cells": cells, "unparsed": vars(self.unparsed), "against": against}
        standings = {label: standing.to_json() for label, standing in self.by_task.items()}
        tasks = {"by_task": standings, "relative": vars(self.relative)} if self.relative else {}
        return {**{key: value for key, value in data.items() if key not in ("by_task", "relative")}, **tasks}

    @property
    def position(self) -> float | None:
        """Tokens at which the chart draws the row: those measured, else the budget, else those before pruning."""
        return next((value for value in (self.tokens, self.keep, self.available) if value is not None), None)


def counted(k: int, n: int) -> Score:
    """The score of k right answers of n."""
    tally = Tally(k, n)
    return Score(k, n, tally.accuracy, *tally.interval)


def clean(value: Any) -> Any:
    """The value as plain JSON data: string keys, no NaN, no lone surrogates; other types as their text.

    A number beyond LARGEST is none, whether infinite or a whole number of a thousand digits.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return value if -LARGEST <= value <= LARGEST else None
    if isinstance(value, dict):
        return {clean(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return clean(str(value))


def is_clean(data: dict[str, Any]) -> bool:
    """Whether `clean` would change nothing in this JSON data with string keys."""
    try:
        json.dumps(data, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:  # a number that is not finite, or a lone surrogate
        return False
    return _within(data)


def _within(value: Any) -> bool:
    """Whether no number in JSON data is beyond LARGEST."""
    if isinstance(value, dict):
        return all(map(_within, value.values()))
    if isinstance(value, list):
        return all(map(_within, value))
    return not isinstance(value, int | float) or -LARGEST <= value <= LARGEST


def mapping(value: Any) -> dict[str, Any]:
    """The value if it is a dictionary, else an empty one."""
    return value if isinstance(value, dict) else {}


def sequence(value: Any) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def text(value: Any) -> str:
    """The value as text; "" for None."""
    return "" if value is None else str(value)


def number(value: Any) -> int | float | None:
    """The value if it is a number, else None."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def item_label(value: Any) -> str:
    """Label of a registered item: `cdpruner`, `convex (semantic 0.7)` for `{convex: {semantic: 0.7}}`, or `none`."""
    if isinstance(value, dict) and len(value) == 1:
        name, params = next(iter(value.items()))
        inner = ", ".join(f"{key} {item}" for key, item in mapping(params).items())
        return f"{name} ({inner})" if inner else text(name)
    return text(value) or NONE


def quantization_label(quantize: Any, dtype: Any = None) -> str:
    """Label of a quantization, such as `rtn W4A4 g128` or `none (bfloat16)`.

    The scope is added if it is not the language model alone.

    Args:
        quantize: the spec's quantize section.
        dtype: the spec's dtype, shown if nothing is quantized.
    """
    spec = mapping(quantize)
    if not spec:
        label = text(quantize)
        return label or (NONE if dtype in (None, "auto") else f"{NONE} ({dtype})")
    weights, activations = mapping(spec.get("weights")), mapping(spec.get("activations"))
    bits = bits_label(spec)
    # A floating-point format says by its name how large its groups are.
    named = [text(part.get("format")) or text(part.get("group_size")) for part in (weights, activations)]
    grouping = [f"g{name}" if name.isdigit() else name for name in dict.fromkeys(named) if name]
    parts = [item_label(spec.get("method")), bits, *grouping]
    if cache := mapping(spec.get("kv")):
        keys, values = (text(mapping(cache.get(side)).get("bits")) or "16" for side in ("keys", "values"))
        parts.append(f"KV{keys}" if keys == values else f"K{keys}V{values}")
    if others := [mapping(one) for one in sequence(spec.get("overrides"))]:
        parts.append(f"({', '.join(map(override_label, others))})" if len(others) < 4 else f"({len(others)} overrides)")
    if chosen := mapping(spec.get("allocate")):
        mean = f"mean {chosen['bits']:g} bits " if isinstance(chosen.get("bits"), int | float) else ""
        parts.append(f"({mean}by {item_label(chosen.get('method'))})")
    scope = [text(name) for name in sequence(spec.get("scope"))]
    if scope and scope != ["language"]:
        parts.append("on " + "+".join(scope))
    return " ".join(parts)


def bits_label(formats: dict[str, Any]) -> str:
    """Bits of weights and activations, such as `W4A16`; 16 stand for no quantization.

    Args:
        formats: the formats by `weights` and `activations`.
    """
    sides = (("W", mapping(formats.get("weights"))), ("A", mapping(formats.get("activations"))))
    return "".join(f"{letter}{text(part.get('bits')) or '?'}" if part else f"{letter}16" for letter, part in sides)


def override_label(override: dict[str, Any]) -> str:
    """Label of the formats of some linears, such as `*.down_proj W8A16`."""
    return f"{text(override.get('linears'))} {bits_label(override)}"


def score_of_column(column: ColumnScore) -> Score:
    """The score of a record's column. If it has k and n, the accuracy is derived from them again."""
    if column.unavailable is not None:
        return Score(reason=column.unavailable)
    if column.k is not None and column.n:
        derived = counted(column.k, column.n)
        if column.low is None or column.high is None:
            return derived
        return Score(column.k, column.n, derived.accuracy, column.low, column.high)
    value = column.accuracy if column.accuracy is not None else column.mean
    if value is not None and 0 <= value <= 1:
        return Score(column.k, column.n, value, column.low, column.high)
    plain = column.figure if column.figure is not None else column.mean
    return Score(column.k, column.n, reason="" if plain is not None else "the record holds no result", plain=plain)


def confidence_cells(scores: ScoreTable) -> dict[str, Score]:
    """The cells of CONFIDENCE; none if the options have no probabilities."""
    if (found := scores.confidence) is None:
        return {}
    return {
        name: Score(n=found.n, plain=value) for name, value in zip(CONFIDENCE, (found.ece, found.brier), strict=True)
    }


def _unparsed(unparsed: Unparsed) -> Score:
    """The score of the answers that the parser could not read."""
    return counted(unparsed.k, unparsed.n) if unparsed.n else Score(reason="no question was asked")


def from_record(record: Record) -> Row:
    """The row of one record, not yet compared with others."""
    spec, tokens, prune = record.spec, record.tokens, mapping(record.spec.get("prune"))
    budget = record.cost.budget if record.cost else None
    labels = record.labels  # they omit parameters that have their default
    return Row(
        name=record.name,
        model=text(spec.get("model")),
        quantization=quantization_label(spec.get("quantize"), spec.get("dtype")),
        pruner=labels.get("pruner") or item_label(prune.get("method")),
        sensitivity=labels.get("sensitivity") or item_label(prune.get("sensitivity")),
        fusion=labels.get("fusion") or item_label(prune.get("fusion")),
        keep=number(prune.get("keep")) if budget is None else budget.keep,
        tokens=tokens.mean if tokens else None,
        tokens_min=tokens.min if tokens else None,
        tokens_max=tokens.max if tokens else None,
        kept=tokens.kept if tokens else None,
        merged=tokens.merged if tokens else None,
        available=tokens.available if tokens else None,
        cells={column.name: score_of_column(column) for column in record.scores.columns}
        | confidence_cells(record.scores),
        unparsed=_unparsed(record.scores.unparsed),
        receipt=record.receipt.summary,
        fallbacks=len(record.receipt.fallbacks),
        run_id=record.run_id,
        created=record.created,
        stand_in=bool(stand_in_notes(record)),
        constructed=any("constructed" in note for note in stand_in_notes(record)),
        transparent=record.receipt.transparent,
        too_long=record.receipt.too_long,
        unanswered=len(record.unanswered),
    )


def stand_in_notes(record: Record) -> list[str]:
    """The record's notes that say that its model or data are an embedded stand-in."""
    return [note for note in record.notes if "stand-in" in note.lower()]


def column_names(rows: Iterable[Row]) -> list[str]:
    """The union of the rows' columns. A column that earlier rows lack goes after the one before it in its own row."""
    names: list[str] = []
    for row in rows:
        after = -1
        for name in row.cells:
            if name not in names:
                names.insert(after + 1, name)
            after = names.index(name)
    return names
