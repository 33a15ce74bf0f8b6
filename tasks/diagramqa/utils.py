"""DiagramQA's part of the shared multiple-choice task: its packaged questions."""

from pathlib import Path
from typing import Any

from qapbench.tasks import multichoice


def dataset(data: str | None = None, **options: Any) -> dict[str, multichoice.Docs]:
    """The packaged questions, or those of another parquet file."""
    packaged = Path(__file__).resolve().with_name("test.parquet")
    return multichoice.dataset(data or str(packaged), **options)
