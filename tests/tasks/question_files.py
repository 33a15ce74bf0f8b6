"""Small data sets of multiple-choice questions for the tests."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from qapbench.spec.task_spec import TaskSpec
from qapbench.tasking.tasks import LoadedTask, load_task

TEXT = pa.string()
SCHEMA = {
    "pid": TEXT,
    "image": pa.struct([("bytes", pa.binary()), ("path", TEXT)]),
    "question": TEXT,
    "choices": pa.list_(TEXT),
    "answer": pa.int64(),
    "hint": TEXT,
    "subject": TEXT,
    "grade": TEXT,
    "topic": TEXT,
}


def png(colour: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def picture(encoded: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": encoded, "path": path}


def row(pid: str, **changes: Any) -> dict[str, Any]:
    base = {
        "pid": pid,
        "image": None,
        "question": f"Which {pid}?",
        "choices": ["one", "two"],
        "answer": 0,
        "hint": "",
        "subject": "natural science",
        "grade": "grade3",
        "topic": "t",
    }
    return {**base, **changes}


ROWS = [
    row("10", image=picture(png("red")), hint="A hint.", answer=1),
    row("11", subject="social science", grade="grade12", choices=["x", "y", "z"], answer=2),
    row("12", image=picture(png("blue", "RGBA"), "b.png"), subject="language science", grade="grade6"),
    row("13", hint="Only  text.", grade="grade7"),
]


def write_rows(path: Path, rows: list[dict[str, Any]], **types: pa.DataType) -> str:
    """A parquet file of rows; `types` replaces the type of a column."""
    fields = [(key, types.get(key, SCHEMA.get(key, TEXT))) for key in rows[0]]
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields)), path)
    return str(path)


def load(data: str, name: str = "scienceqa", **fields: Any) -> LoadedTask:
    return load_task(TaskSpec(name=name, data=data, **{"answers": "generate", **fields}))
