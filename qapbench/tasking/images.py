"""Decodes images of documents, in this one place, and hashes them by content.

An image of a document is a PIL image, or a lazy handle with `decode(background)` and `digest()`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from PIL import Image, ImageOps

from qapbench.errors import Problem, UserError, first_line

DEEP = ("I;16", "I;16B", "I;16L", "I;16N")  # Pillow's modes of 16-bit grey
OPAQUE = 255  # largest alpha
UNBOUNDED = ("I", "F")  # modes whose numbers do not say which of them is white


class UnreadablePictureError(UserError):
    """A picture cannot be decoded, or not without a guess."""


GREY = (128, 128, 128)  # colour of a blank image


def listed_images(images: Any) -> list[Any]:
    """What a task gives for the images of a document, as a list: it may be a list, a single image, or None."""
    listed = images if isinstance(images, list | tuple) else [images]
    return [image for image in listed if image is not None]


class Decoded(NamedTuple):
    """A decoded picture.

    Attributes:
        picture: the picture in RGB, upright.
        transparent: whether the file has pixels that are not opaque.
    """

    picture: Image.Image
    transparent: bool


class BlankImage:
    """A lazy handle of a grey image of the size of another, for questions that are asked without their images.

    Args:
        image: the image whose place it takes.
    """

    def __init__(self, image: Any) -> None:
        self.image = image

    def decode(self, background: str | None = None) -> Decoded:
        """The grey image; see `decode`. The background is not seen."""
        return Decoded(Image.new("RGB", decoded(self.image).size, GREY), False)

    def digest(self) -> str:
        """Hash of its content: of its size."""
        return hashlib.sha256(f"blank {decoded(self.image).size}".encode()).hexdigest()


class OnBackground:
    """A lazy handle of an image whose transparent pixels are put on a colour.

    Args:
        image: the image.
        background: the colour, `#rrggbb`.
    """

    def __init__(self, image: Any, background: str) -> None:
        self.image, self.background = image, background

    def decode(self, background: str | None = None) -> Decoded:
        """The picture on the background of this handle; see `decode`."""
        return decode(self.image, self.background)

    def digest(self) -> str:
        """Hash of the image's file and of the background, or of the pixels where they meet if there is no file."""
        if not hasattr(self.image, "digest"):
            return digest_image(self.decode().picture)
        return hashlib.sha256(f"{digest_image(self.image)} {self.background}".encode()).hexdigest()


def decoded(image: Any) -> Image.Image:
    """The image in RGB, upright.

    Raises:
        UnreadablePictureError: it cannot be decoded.
    """
    return decode(image).picture


def decode(image: Any, background: str | None = None) -> Decoded:
    """Decode an image of a document.

    Args:
        image: a PIL image, or a lazy handle.
        background: the colour that its transparent pixels are put on, `#rrggbb`; see `as_rgb`.

    Raises:
        UnreadablePictureError: it cannot be decoded.
    """
    return as_rgb(image, background) if isinstance(image, Image.Image) else image.decode(background)


def as_rgb(image: Image.Image, background: str | None = None) -> Decoded:
    """An opened picture in RGB, upright, as transformers' `load_image` returns it.

    A picture that says in its EXIF data how it was held is turned. 16-bit grey is scaled to 8 bits, where Pillow would
    clip all but the darkest 255 of its levels to white.

    Args:
        image: the picture.
        background: the colour that transparent pixels are put on, `#rrggbb`. Without one they have the colour that is
            stored below them, which is often black, as in LLaVA's code.

    Raises:
        UnreadablePictureError: its data are damaged, or its numbers have no white: 32-bit integers and floats.
    """
    if image.mode in UNBOUNDED:
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise UnreadablePictureError(f"a {kind} picture does not say which number is white; save it with 8 or 16 bits")
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode in DEEP:
            upright = _scaled(upright)
        if not upright.has_transparency_data:
            return Decoded(upright.convert("RGB"), False)
        layer = upright.convert("RGBA")
        transparent = layer.getchannel("A").histogram()[OPAQUE] < layer.width * layer.height
        if transparent and background is not None:
            upright = Image.alpha_composite(Image.new("RGBA", layer.size, background), layer)
        return Decoded(upright.convert("RGB"), transparent)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadablePictureError(f"not a readable picture ({first_line(error)})") from None


def _scaled(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, rounded to the nearest level. One of its levels may be transparent."""
    import numpy as np

    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if (clear := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, OPAQUE).astype(np.uint8)))
    return grey


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
