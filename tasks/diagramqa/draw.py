"""Drawing of icons, letters and arrows on a canvas of 96 x 96 pixels with a light background.

Everything is drawn at the final resolution, without supersampling, and icons and letters are cached, so that drawing
one scene takes well under 2 ms.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from .scene import Box, Thing

if TYPE_CHECKING:
    import numpy as np

SIDE = 96
CELL = 32
HERE = Path(__file__).parent
INK = (20, 20, 20)

Color = tuple[int, int, int]

COLORS: dict[str, Color] = {
    "red": (220, 40, 40),
    "blue": (40, 80, 220),
    "green": (40, 160, 60),
    "yellow": (245, 210, 40),
    "orange": (245, 140, 30),
    "purple": (140, 60, 180),
    "pink": (250, 150, 190),
    "brown": (130, 80, 40),
    "gray": (150, 150, 150),
}
PALE: list[Color] = [
    (255, 255, 255),
    (255, 246, 214),
    (222, 240, 255),
    (228, 248, 222),
    (252, 228, 236),
    (238, 230, 250),
    (240, 240, 240),
]
CELL_COLORS: dict[str, Color] = {
    "yellow": (255, 236, 140),
    "blue": (165, 205, 255),
    "green": (170, 230, 160),
    "pink": (255, 190, 210),
    "purple": (210, 185, 245),
    "orange": (255, 205, 150),
    "gray": (205, 205, 205),
    "white": (255, 255, 255),
}


@functools.cache
def index() -> dict[str, dict[str, object]]:
    """The index of the sprite sheet: "cell" (column, row), "category" and "held_out" of each icon, by its name."""
    return json.loads((HERE / "sprites.json").read_text())


@functools.cache
def sheet() -> Image.Image:
    """The sprite sheet as an RGBA image."""
    with Image.open(HERE / "sprites.png") as image:
        return image.convert("RGBA")


@functools.cache
def icons(category: str = "", held_out: bool = False) -> tuple[str, ...]:
    """Names of the icons in `category` ("" for all categories): only held-out icons, or only the others."""
    return tuple(
        name for name, entry in index().items() if entry["held_out"] == held_out and category in ("", entry["category"])
    )


@functools.cache
def categories() -> tuple[str, ...]:
    """Names of all categories, in the order of the sprite sheet."""
    return tuple(dict.fromkeys(str(entry["category"]) for entry in index().values()))


def category_of(name: str) -> str:
    """The category of the icon `name`."""
    return str(index()[name]["category"])


@functools.cache
def sprite(name: str, size: int) -> Image.Image:
    """The icon `name` as an RGBA image of `size` x `size` pixels."""
    cell_of: Any = index()[name]["cell"]
    column, row = cell_of
    cell = sheet().crop((column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL))
    return cell if size == CELL else cell.resize((size, size), Image.Resampling.LANCZOS)


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that comes with Pillow. No font of the system is used, so the pixels are the same everywhere."""
    return ImageFont.load_default(size)


@functools.cache
def glyph(text: str, size: int) -> Image.Image:
    """Render `text` as a mask without margins. Strokes are thickened: thin ones vanish in patches of 8 x 8 pixels."""
    mask = Image.new("L", (size * (len(text) + 1) + 4, size * 2 + 4))
    ImageDraw.Draw(mask).text((2, 2), text, fill=255, font=font(size), stroke_width=0.4)
    return mask.crop(mask.getbbox())


class Canvas:
    """An image that is being drawn, with a record of the things drawn on it so far.

    Attributes:
        image: the RGB image of SIDE x SIDE pixels.
        draw: Pillow's drawing object for `image`.
        things: the things that were recorded.
    """

    def __init__(self, background: Color = (255, 255, 255)) -> None:
        self.image = Image.new("RGB", (SIDE, SIDE), background)
        self.draw = ImageDraw.Draw(self.image)
        self.things: list[Thing] = []

    def thing(self, name: str, box: Box) -> Box:
        """Record a thing that was drawn. Its box is clipped to the image, and the clipped box is returned."""
        x0, y0, x1, y1 = box
        box = (max(0, x0), max(0, y0), min(SIDE, x1), min(SIDE, y1))
        self.things.append(Thing(name, box))
        return box

    def describe(self, box: Box, **about: str) -> None:
        """Add to what is known of the things whose box is exactly `box`: one value per slot."""
        for thing in self.things:
            if thing.box == box:
                thing.about |= about

    def icon(self, name: str, x: int, y: int, size: int = 24) -> Box:
        """Paste the icon `name` centred at (x, y), or further inward if it would leave the image. Returns its box."""
        left = min(max(x - size // 2, 0), SIDE - size)
        top = min(max(y - size // 2, 0), SIDE - size)
        picture = sprite(name, size)
        self.image.paste(picture, (left, top), picture)
        return self.thing(name, (left, top, left + size, top + size))

    def text(self, text: str, x: int, y: int, size: int = 14, color: Color = INK, name: str = "") -> Box:
        """Write `text` centred at (x, y), or further inward if it would leave the image, and record it as a thing.

        Args:
            text: the text to write.
            x: horizontal position of the centre in pixels.
            y: vertical position of the centre in pixels.
            size: size of the font.
            color: colour of the text.
            name: name of the recorded thing; "" gives a name such as "letter A" or "number 3".

        Returns:
            The box of the text.
        """
        mask = glyph(text, size)
        left = min(max(x - mask.width // 2, 0), SIDE - mask.width)
        top = min(max(y - mask.height // 2, 0), SIDE - mask.height)
        self.image.paste(color, (left, top, left + mask.width, top + mask.height), mask)
        kind = "letter" if text.isalpha() else "number"
        return self.thing(name or f"{kind} {text}", (left, top, left + mask.width, top + mask.height))

    def arrow(self, start: tuple[float, float], end: tuple[float, float], color: Color = INK) -> Box:
        """Draw a thick arrow from `start` to its tip at `end`. Returns its box."""
        dx, dy = end[0] - start[0], end[1] - start[1]
        length = math.hypot(dx, dy) or 1.0
        ux, uy = dx / length, dy / length
        neck = (end[0] - 11 * ux, end[1] - 11 * uy)
        self.draw.line([start, neck], fill=color, width=4)
        self.draw.polygon([end, (neck[0] - 7 * uy, neck[1] + 7 * ux), (neck[0] + 7 * uy, neck[1] - 7 * ux)], fill=color)
        xs, ys = (start[0], end[0]), (start[1], end[1])
        pad = 5
        return self.thing("arrow", (int(min(xs)) - pad, int(min(ys)) - pad, int(max(xs)) + pad, int(max(ys)) + pad))

    def decorate(self, rng: np.random.Generator) -> None:
        """Paste one held-out icon as a distractor, which no training image contains, where nothing else is drawn.

        If 40 random positions are all occupied, nothing is pasted.
        """
        names = icons(held_out=True)
        name = names[int(rng.integers(len(names)))]
        size = 14
        for _ in range(40):
            x, y = (int(v) for v in rng.integers(size // 2, SIDE - size // 2, 2))
            box = (x - size // 2, y - size // 2, x + size // 2, y + size // 2)
            if not any(overlap(box, other.box) for other in self.things):
                self.icon(name, x, y, size)
                return


def overlap(a: Box, b: Box) -> bool:
    """Tell whether two boxes share a pixel."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def union(*boxes: Box) -> Box:
    """The smallest box that contains all `boxes`."""
    return (
        min(b[0] for b in boxes),
        min(b[1] for b in boxes),
        max(b[2] for b in boxes),
        max(b[3] for b in boxes),
    )
