"""Images of documents: decoded, and hashed by content."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from PIL import Image


def decoded(image: Any) -> Image.Image:
    """A picture in RGB, from PIL or from a lazy handle with `load()`."""
    return (image if isinstance(image, Image.Image) else image.load()).convert("RGB")


def digest_image(image: Any) -> str:
    """The hash of an image's content: of its file where the task knows it, else of its pixels."""
    if hasattr(image, "digest"):
        return image.digest()
    picture = decoded(image)
    return hashlib.sha256(json.dumps(picture.size).encode() + picture.tobytes()).hexdigest()
