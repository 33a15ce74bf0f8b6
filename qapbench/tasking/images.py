"""Decodes images of documents, in this one place, and hashes them by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from PIL import Image, ImageOps

from qapbench.errors import Problem, UserError, first_line

DEEP = ("I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes of 16-bit grey
UNBOUNDED = ("I", "F")  # modes whose numbers do not say which of them is white


class UnreadablePictureError(UserError):
    """A picture cannot be decoded, or not without a guess."""


def listed_images(images: Any) -> list[Any]:
    """What a task gives for the images of a document, as a list: it may be a list, a single image, or None."""
    listed = images if isinstance(images, list | tuple) else [images]
    return [image for image in listed if image is not None]


GREY = (128, 128, 128)  # colour of a blank image


class BlankImage:
    """A grey image of the size of another, for questions that are asked without their images.

    Args:
        image: the image whose place it takes.
    """

    def __init__(self, image: Any) -> None:
        self.image = image

    def load(self) -> Image.Image:
        """The grey image.

        Raises:
            UnreadablePictureError: the other one cannot be decoded.
        """
        return Image.new("RGB", decoded(self.image).size, GREY)

    def digest(self) -> str:
        """Hash of its content: of its size."""
        return hashlib.sha256(f"blank {decoded(self.image).size}".encode()).hexdigest()


def decoded(image: Any) -> Image.Image:
    """The image in RGB, upright.

    Args:
        image: a PIL image, or a lazy handle with `load()`, which decodes with `as_rgb`.

    Raises:
        UnreadablePictureError: it cannot be decoded.
    """
    return as_rgb(image) if isinstance(image, Image.Image) else image.load()


def as_rgb(image: Image.Image) -> Image.Image:
    """An opened picture in RGB, upright, as transformers' `load_image` returns it.

    A picture that says in its EXIF data how it was held is turned. 16-bit grey is scaled to 8 bits, where Pillow would
    clip all but the darkest 255 of its levels to white. A transparent pixel has the colour that is stored below it.

    Raises:
        UnreadablePictureError: its data are damaged, or its numbers have no white: 32-bit integers and floats.
    """
    if image.mode in UNBOUNDED:
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise UnreadablePictureError(f"a {kind} picture does not say which number is white; save it with 8 or 16 bits")
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in DEEP:
            return _scaled(upright).convert("RGB")
        return upright.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadablePictureError(f"not a readable picture ({first_line(error)})") from None


def _scaled(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, rounded to the nearest level."""
    import numpy as np

    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def check_pictures(documents: Iterable[tuple[str, Iterable[Any]]], where: tuple[str, ...] = ("task", "data")) -> None:
    """Decode pictures, and name every one that cannot be decoded.

    Args:
        documents: (id of the question, its images).
        where: the field of the spec that names the data.

    Raises:
        UnreadablePictureError: some cannot be decoded; there is a line for each.
    """
    problems = []
    for name, images in documents:
        for image in images:
            try:
                decoded(image)
            except UserError as error:
                problems += [Problem(f"question '{name}': {problem.message}", where) for problem in error.problems]
    if problems:
        raise UnreadablePictureError(problems)


def digest_image(image: Any) -> str:
    """Hash of an image's content: of its file if the handle has a `digest()`, otherwise of its pixels."""
    if hasattr(image, "digest"):
        return image.digest()
    picture = decoded(image)
    return hashlib.sha256(json.dumps(picture.size).encode() + picture.tobytes()).hexdigest()
