"""Images as the model saw them, for whoever draws on them."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import numpy as np
from PIL import Image

LARGEST = 336  # pixels a side of an image that goes into a page


def seen_image(image: Image.Image, image_processor: Any = None) -> Image.Image:
    """What is left of an image after resizing and cropping, so that a grid of tokens can be laid over it.

    Args:
        image_processor: the model's own; without one the centre square, which is what CLIP's takes.
    """
    if image_processor is not None:
        pixels = np.asarray(image_processor(images=image, return_tensors="np")["pixel_values"][0], dtype=np.float32)
        if pixels.ndim != 3 or pixels.shape[0] != 3:
            return image.convert("RGB")  # cut into tiles or patches: nothing is left out
        scaling = (image_processor.image_mean, image_processor.image_std)
        mean, std = (np.asarray(values, dtype=np.float32)[:, None, None] for values in scaling)
        return Image.fromarray(((pixels * std + mean).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).convert("RGB")


def data_uri(image: Image.Image) -> str:
    """The image for an <img>, at most LARGEST pixels a side: drawings as PNG, whatever is smaller as JPEG."""
    image = image.copy()
    image.thumbnail((LARGEST, LARGEST))
    encoded = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 82})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda name: len(encoded[name]) * (1.0 if name == "png" else 1.5))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"


def grid_of(count: int) -> tuple[int, int] | None:
    """(height, width) of a square grid of that many tokens; None where there is none."""
    side = math.isqrt(count)
    return (side, side) if side and side * side == count else None
