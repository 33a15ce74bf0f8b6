"""A random LLaVA on a small file of questions: every run takes the real path in a second."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from llava_checkpoints import save_clip, save_llava
from run_questions import QUESTIONS, row


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_llava(tmp_path_factory.mktemp("tiny") / "llava")
    save_clip(folder / "clip")
    return folder


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half with an image; subjects and grades known throughout."""
    path = tmp_path_factory.mktemp("data") / "test.parquet"
    pd.DataFrame([row(index) for index in range(QUESTIONS)]).to_parquet(path)
    return path


@pytest.fixture
def spec_of(tiny_model: Path, questions: Path) -> Callable[..., dict[str, Any]]:
    def make(**more: Any) -> dict[str, Any]:
        task = {"name": "scienceqa", "data": str(questions), **more.pop("task", {})}
        return {"name": "t", "model": str(tiny_model), "task": task, **more}

    return make


@pytest.fixture
def write_spec(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def write(data: dict[str, Any]) -> Path:
        path = tmp_path / "spec.yaml"
        path.write_text(json.dumps(data))  # JSON is YAML
        return path

    return write
