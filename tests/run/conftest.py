"""A random LLaVA on a small file of questions: every run takes the real path in a second."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from llava_checkpoints import save_clip, save_llava
from PIL import Image

QUESTIONS = 14


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_llava(tmp_path_factory.mktemp("tiny") / "llava")
    save_clip(folder / "clip")
    return folder


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half with an image; subjects and grades known throughout."""
    path = tmp_path_factory.mktemp("data") / "test.parquet"
    pd.DataFrame([_row(index) for index in range(QUESTIONS)]).to_parquet(path)
    return path


def _row(index: int) -> dict[str, Any]:
    image = None
    if index % 2 == 0:
        pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        image = {"bytes": buffer.getvalue(), "path": None}
    return {
        "pid": f"q{index}", "image": image, "question": "Where does the red fox live?" + " What is this?" * (index % 3),
        "choices": ["cat", "dog", "tree"][: 2 + index % 2], "answer": index % 2, "hint": "picture" if index % 3 else "",
        "subject": ["natural science", "social science", "language science"][index % 3],
        "grade": f"grade{1 + index % 12}",
    }  # fmt: skip


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
