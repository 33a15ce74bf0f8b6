"""Images as the model received them, to draw on."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from qapbench.checkpoints.json_files import read_mapping

LARGEST = 336  # pixels on the longer side of an image in a page
ONE_VIEW = ("CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor")
"""Image processors that turn an image into one picture; all others cut it into tiles or patches."""
BICUBIC = Image.Resampling.BICUBIC


def seen_image(image: Image.Image, config: Mapping[str, Any] | None = None) -> Image.Image:
    """The part of an image that the model received, after resizing and cropping, so that a token grid fits over it.

    Args:
        config: JSON data of the model's image processor, from `image_processor_config`. None takes the centre square,
            which is what CLIP's processor does.
    """
    image = image.convert("RGB")
    kind = str((config or {}).get("image_processor_type")).removesuffix("Fast").removesuffix("Pil")
    if config is not None and kind not in ONE_VIEW:
        return image  # cut into tiles or patches: nothing is left out
    if config is not None and config.get("do_pad"):
        return _padded(image, config)
    if config is not None and not config.get("do_center_crop"):
        size = config.get("size") or {}
        return image.resize((int(size["width"]), int(size["height"])), BICUBIC) if "width" in size else image
    size, crop = (config or {}).get("size") or {}, (config or {}).get("crop_size") or {}
    edge = int(size.get("shortest_edge") or min(image.size))
    scale = edge / min(image.size)
    image = image.resize((max(round(image.width * scale), edge), max(round(image.height * scale), edge)), BICUBIC)
    width, height = int(crop.get("width") or edge), int(crop.get("height") or edge)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _padded(image: Image.Image, config: Mapping[str, Any]) -> Image.Image:
    """The image, centred on a square of the mean colour as LLaVA pads it, at the model's resolution."""
    side = max(image.size)
    mean = tuple(int(255 * value) for value in config.get("image_mean") or (0, 0, 0))
    square = Image.new("RGB", (side, side), mean)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    edge = int((config.get("size") or {}).get("shortest_edge") or side)
    return square.resize((edge, edge), BICUBIC)


def image_processor_config(folder: Path) -> dict[str, Any]:
    """The image processor's configuration in a checkpoint folder.

    Raises:
        UserError: the folder holds none.
    """
    processor = folder / "processor_config.json"
    if processor.is_file() and isinstance(found := read_mapping(processor).get("image_processor"), dict):
        return found
    return read_mapping(folder / "preprocessor_config.json")


def data_uri(image: Image.Image) -> str:
    """The image as a data URI for an <img>, at most LARGEST pixels on each side.

    PNG is used, as for drawings, unless JPEG is smaller by a third.
    """
    image = image.copy()
    image.thumbnail((LARGEST, LARGEST))
    options: dict[str, dict[str, Any]] = {"png": {"optimize": True}, "jpeg": {"quality": 82}}
    encoded = {kind: encoded_as(kind, image, **more) for kind, more in options.items()}
    kind = min(encoded, key=lambda name: len(encoded[name]) * (1.0 if name == "png" else 1.5))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode()}"


def encoded_as(kind: str, image: Image.Image, **options: Any) -> bytes:
    """The bytes of an image file.

    Args:
        kind: "png" or "jpeg".
        image: the image.
        **options: Pillow's options for that format.
    """
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grid_of(count: int) -> tuple[int, int] | None:
    """(height, width) of the square grid that `count` tokens form; None if they form none."""
    side = math.isqrt(count)
    return (side, side) if side and side * side == count else None
