"""The questions that the run tests ask."""

import io
from typing import Any

import numpy as np
from PIL import Image

QUESTIONS = 14


def encoded(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def row(index: int) -> dict[str, Any]:
    image = None
    if index % 2 == 0:
        pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        image = {"bytes": encoded(Image.fromarray(pixels)), "path": None}
    return {
        "pid": f"q{index}",
        "image": image,
        "question": "Where does the red fox live?" + " What is this?" * (index % 3),
        "choices": ["cat", "dog", "tree"][: 2 + index % 2],
        "answer": index % 2,
        "hint": "picture" if index % 3 else "",
        "subject": ["natural science", "social science", "language science"][index % 3],
        "grade": f"grade{1 + index % 12}",
    }
