"""DiagramQA's part of the shared multiple-choice task: its packaged questions, and drawn ones for calibration."""

import functools
import hashlib
import io
from pathlib import Path
from typing import Any

from qapbench.tasks import multichoice

HERE = Path(__file__).resolve().parent


def dataset(data: str | None = None, **options: Any) -> dict[str, multichoice.Docs]:
    """The packaged questions, or those of another parquet file."""
    source = multichoice.CalibrationSource(calibration_rows, _version())
    return multichoice.dataset(data or str(HERE / "test.parquet"), calibration=source, **options)


def calibration_rows(samples: int, seed: int) -> list[dict[str, Any]]:
    """Questions of the split `train`, which shares no image and no text question with the test; half with an image."""
    from PIL import Image

    from qapbench.tasks.diagramqa.generate import build

    rows = build("train", seed, images=samples - samples // 2, texts=samples // 2).to_dict("records")
    for row in rows:
        row["image"] = row["image"] and Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    return rows


@functools.cache
def _version() -> str:
    """A hash of what draws them."""
    files = sorted([*HERE.rglob("*.py"), *HERE.glob("sprites.*")])
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
