"""Fixtures of the task tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from question_files import ROWS, write_rows


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """datasets keeps its copies below the test's folder, not in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Writes rows to `data.parquet` and returns its path."""

    def write(rows: list[dict[str, Any]] = ROWS, **types: pa.DataType) -> str:
        return write_rows(tmp_path / "data.parquet", rows, **types)

    return write
