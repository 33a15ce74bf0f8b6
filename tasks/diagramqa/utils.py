"""The task `diagramqa`: its packaged questions, and the generation of questions for calibration.

Everything else is shared with other tasks, in `tasks/multichoice.py`.
"""

import functools
import hashlib
import io
from pathlib import Path
from typing import Any

from qapbench.tasking.registry import task
from qapbench.tasks import multichoice

HERE = Path(__file__).resolve().parent


@task("diagramqa")
def dataset(data: str | None = None, **options: Any) -> dict[str, multichoice.Docs]:
    """Load the packaged questions of DiagramQA, or those of another parquet file.

    Args:
        data: path of a parquet file; None for the packaged one.
        **options: passed on to `multichoice.dataset`.
    """
    source = multichoice.CalibrationSource(calibration_rows, _version())
    return multichoice.dataset(data or str(HERE / "test.parquet"), calibration=source, **options)


def calibration_rows(samples: int, seed: int) -> list[dict[str, Any]]:
    """Generate questions for calibration, half of them with an image.

    They belong to the split "train", which shares no image and no text-only question with the split "test".

    Args:
        samples: number of questions.
        seed: seed of the split.

    Returns:
        The rows; `image` is a decoded RGB image or None.
    """
    from PIL import Image

    from qapbench.tasks.diagramqa.generate import build

    rows = build("train", seed, images=samples - samples // 2, texts=samples // 2).to_dict("records")
    for row in rows:
        row["image"] = row["image"] and Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
    return rows


@functools.cache
def _version() -> str:
    """Hash of the code and the sprites that the calibration questions are generated with."""
    files = sorted([*HERE.rglob("*.py"), *HERE.glob("sprites.*")])
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
