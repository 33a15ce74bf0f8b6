"""Drawing of a contact sheet: enlarged images of scenes, with questions beside each of them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw

from .draw import SIDE, font
from .scene import Scene

ZOOM = 3
WIDTH, HEIGHT = 590, SIDE * ZOOM + 12


def contact_sheet(scenes: Sequence[Scene], columns: int = 3) -> Image.Image:
    """Draw the scenes side by side, each with its family, its hint and two of its questions.

    The right choice is marked with a star. The place of a scene without an image stays empty.

    Args:
        scenes: the scenes, from the top left to the bottom right.
        columns: number of scenes in a row of the sheet.

    Returns:
        An image with a palette of 128 colours.
    """
    rows = -(-len(scenes) // columns)
    page = Image.new("RGB", (columns * WIDTH, rows * HEIGHT), (255, 255, 255))
    draw = ImageDraw.Draw(page)
    for n, scene in enumerate(scenes):
        x, y = (n % columns) * WIDTH + 6, (n // columns) * HEIGHT + 6
        if scene.image is None:
            continue
        page.paste(scene.image.resize((SIDE * ZOOM, SIDE * ZOOM), Image.Resampling.NEAREST), (x, y))
        lines = [f"[{scene.questions[0].family}]"]
        for question in scene.questions[:2]:
            lines += textwrap.wrap(question.question, 42)
            marks = [("*" if k == question.answer else "") + c for k, c in enumerate(question.choices)]
            lines += textwrap.wrap("   " + " | ".join(marks), 46)
        if scene.questions[0].hint:
            lines += textwrap.wrap("hint: " + scene.questions[0].hint, 42)
        draw.multiline_text((x + SIDE * ZOOM + 10, y), "\n".join(lines), fill=(0, 0, 0), font=font(12))
    return page.quantize(128)
