"""Records that say as little as a record can."""

from __future__ import annotations

from typing import Any

from qapbench.records.record import Record, parse_record


def small_record(columns: list[dict[str, Any]], **fields: Any) -> Record:
    """A record with those columns of scores; everything else is empty, or as given."""
    return parse_record(
        {
            "schema": 2,
            "run_id": "0" * 16,
            "name": "run",
            "created": "1",
            "spec": {},
            "scores": {"columns": columns, "unparsed": {"k": 0, "n": 0}},
            "receipt": {"summary": ""},
            "fingerprints": {},
            "timing": {"seconds": 1.0},
            **fields,
        }
    )
