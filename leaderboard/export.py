"""The rows of the table as CSV, as JSON, and as data for the page's script."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from typing import Any

import yaml

from qapbench.records.record import Record
from qapbench.visible import HIDDEN, json_visible, visible

from .costs import cost_columns
from .flips import Flips
from .ranking import REFERENCES
from .rows import Row, Score, Standing, Versus, mapping

FIELDS = ["kind", "rank", "name", "model", "quantization", "pruner", "sensitivity", "fusion", "keep"]
FIELDS += ["tokens", "tokens_min", "tokens_max", "kept", "merged", "available"]
VERSUS = ["name", "difference", "low", "high", "p", "q", "gained", "lost"]
LAST_FIELDS = ["moved", "transparent", "too_long", "unanswered", "left_out"]
LAST_FIELDS += ["receipt", "fallbacks", "run_id", "created", "stand_in"]
_NUMBER = re.compile(r"-\d+(\.\d+)?")
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""libyaml's writer where PyYAML was built with it, which is several times as fast."""
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""With the wide forms of the first four, which spreadsheets of East Asia read alike."""


def percent(share: float | None, digits: int = 2) -> str:
    """A fraction in percent, without a percent sign; "" for None.

    Args:
        share: the fraction.
        digits: number of decimals.
    """
    return "" if share is None else f"{100 * share:.{digits}f}"


def signed(share: float | None, digits: int = 2) -> str:
    """A difference of fractions in percentage points, with its sign; "" for None.

    Args:
        share: the difference.
        digits: number of decimals.
    """
    return "" if share is None else f"{100 * share:+.{digits}f}"


def plain(value: float | int | None, digits: int = 1) -> str:
    """A number as the table shows it, whole numbers without a decimal point; "" for None.

    Args:
        value: the number.
        digits: number of decimals.
    """
    if value is None:
        return ""
    return str(int(value)) if value == int(value) else f"{value:.{digits}f}"


def csv_text(rows: Sequence[Row], columns: Sequence[str], labels: Sequence[str] = ()) -> str:
    """The rows as CSV, one line per row.

    Accuracies are in percent as in the table, each followed by k, n and its interval. Then come the references, each
    with the difference in percentage points; on a page with several tasks these are listed for each task, with the rank
    in it, and the relative average comes first. The costs that some row has follow. A text that a spreadsheet would
    read as a formula gets an apostrophe in front.

    Args:
        rows: the rows.
        columns: names of the score columns.
        labels: labels of the tasks, if some run asked several.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    scores = [*columns, "unparsed"]
    heads = [f"{name}{part}" for name in scores for part in ("", " k", " n", " low", " high")]
    if labels:
        heads.append("relative average")
    for label in labels or [""]:
        heads += [f"{label} rank"] if label else []
        heads += [f"{label} {kind} {part}".strip() for kind in REFERENCES for part in VERSUS]
    costs = cost_columns(rows)
    heads += [column.head for column in costs.values()]
    writer.writerow([_harmless(name) for name in (*FIELDS, *heads, *LAST_FIELDS)])
    for row in rows:
        line = [getattr(row, name) for name in FIELDS]
        for cell in (*(row.cells.get(name, Score()) for name in columns), row.unparsed):
            shown = percent(cell.accuracy) if cell.plain is None else cell.plain
            line += [shown, cell.k, cell.n, percent(cell.low), percent(cell.high)]
        if labels:
            line.append(percent(row.relative.accuracy if row.relative else None))
        for label in labels or [""]:
            standing = row.by_task.get(label, Standing()) if label else Standing(against=row.against)
            line += [standing.rank] if label else []
            for kind in REFERENCES:
                line += _versus_cells(standing.against.get(kind))
        line += [row.costs.get(name) for name in costs]
        line += [getattr(row, name) for name in LAST_FIELDS]
        writer.writerow([_harmless(value) for value in line])
    return buffer.getvalue()


def _versus_cells(versus: Versus | None) -> list[Any]:
    """The cells of one comparison, as VERSUS names them."""
    if versus is None:
        return ["", *[""] * 3, *[None] * len(VERSUS[4:])]
    shares = [percent(getattr(versus, part)) for part in VERSUS[1:4]]
    return [versus.name, *shares, *(getattr(versus, part) for part in VERSUS[4:])]


def _harmless(value: Any) -> Any:
    """The value with hidden characters escaped, and an apostrophe in front if a spreadsheet would read a formula."""
    value = visible(value) if isinstance(value, str) else value
    starts = isinstance(value, str) and value.startswith(FORMULA_STARTS)
    return f"'{value}" if starts and not _NUMBER.fullmatch(value) else value


_ESCAPED = re.compile(r"\\[bfru]")
"""The escapes that JSON has for characters which a screen would obey, all but tab and new line."""


def json_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows with all their fields as JSON, one row per line; accuracies are fractions.

    Args:
        rows: the rows as plain data.
    """
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    return json_visible(f"[\n{lines}\n]\n" if lines else "[]\n")


def script_json(data: Any) -> str:
    """The data as JSON that may stand inside <script>: it cannot end the element and hides nothing."""
    dumped = _dumped(data)
    # To look at the whole text is ten times as fast as to walk the data, and nearly always nothing is found.
    if HIDDEN.search(dumped) or _ESCAPED.search(dumped):
        dumped = _dumped(all_visible(data))
    return dumped.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _dumped(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def all_visible(data: Any) -> Any:
    """JSON data with hidden characters escaped in every text and key. What holds none is not copied."""
    if isinstance(data, str):
        return visible(data)
    if isinstance(data, dict):
        shown = {visible(key) if isinstance(key, str) else key: all_visible(item) for key, item in data.items()}
        return shown if list(shown) != list(data) or any(shown[key] is not data[key] for key in data) else data
    if isinstance(data, list):
        items = [all_visible(item) for item in data]
        return items if any(new is not old for new, old in zip(items, data, strict=True)) else data
    return data


def page_data(
    rows: Sequence[Row],
    records: Sequence[Record],
    columns: Sequence[str],
    flips: Flips,
    studies: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The data for the page's script.

    Runs of one model often have the same receipt of linears, so each different one is listed only once.

    Args:
        rows: rows of the records in their order, then those of the paper.
        records: the records.
        columns: names of the score columns.
        flips: questions whose answers changed.
        studies: summaries of studies.
    """
    pool: dict[str, int] = {}
    numbers: dict[int, int] = {}
    details = []
    for record in records:
        lines = record.receipt.linears
        if id(lines) not in numbers:  # records that were read together share equal lists
            table = _columnar([line.model_dump(mode="json") for line in lines])
            numbers[id(lines)] = pool.setdefault(json.dumps(table), len(pool))
        details.append(
            {
                "yaml": spec_yaml(record.spec),
                "linears": numbers[id(lines)],
                "fallbacks": record.receipt.fallbacks,
                "notes": record.notes,
                "environment": _flat(record.environment.model_dump(mode="json", exclude_none=True)),
                "fingerprints": _flat(record.fingerprints),
                "timing": _flat(record.timing.model_dump(mode="json", exclude_none=True)),
            }
        )
    return {
        "columns": list(columns),
        "rows": [row.to_json() for row in rows],
        "details": details,
        "linears": [json.loads(table) for table in pool],
        "flips": vars(flips),
        "studies": list(studies),
    }


def spec_yaml(spec: Any) -> str:
    """The spec as YAML that reads back to equal data."""
    if spec is None:
        return ""
    written = yaml.dump(spec, Dumper=DUMPER, sort_keys=False, allow_unicode=True, width=100)
    if HIDDEN.search(written):  # YAML has escapes for them only where it escapes all that is not ASCII
        written = yaml.dump(spec, Dumper=DUMPER, sort_keys=False, width=100)
    return written


def _columnar(items: Sequence[Any]) -> dict[str, Any]:
    """Mappings as a table: the union of their keys, and a row of values for each."""
    keys = list(dict.fromkeys(key for item in items for key in mapping(item)))
    return {"keys": keys, "rows": [[mapping(item).get(key) for key in keys] for item in items]}


def _flat(value: Any) -> list[list[str]]:
    """Keys and values as texts, in the record's order."""
    items = mapping(value).items()
    return [[key, item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)] for key, item in items]
