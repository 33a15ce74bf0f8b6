"""Decodes images of documents, and hashes them by content."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from PIL import Image


def decoded(image: Any) -> Image.Image:
    """The image in RGB.

    Args:
        image: a PIL image, or a lazy handle with `load()`.
    """
    return (image if isinstance(image, Image.Image) else image.load()).convert("RGB")


def digest_image(image: Any) -> str:
    """Hash of an image's content: of its file if the handle has a `digest()`, otherwise of its pixels."""
    if hasattr(image, "digest"):
        return image.digest()
    picture = decoded(image)
    return hashlib.sha256(json.dumps(picture.size).encode() + picture.tobytes()).hexdigest()
