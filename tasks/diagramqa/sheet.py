"""A contact sheet: scenes of every image family, enlarged, with a question beside each."""

from __future__ import annotations

import textwrap

from PIL import Image, ImageDraw

from .draw import SIDE, font
from .generate import image_families, sample

ZOOM = 3
WIDTH, HEIGHT = 590, SIDE * ZOOM + 12


def contact_sheet(seed: int, split: str, columns: int = 3, per_family: int = 2) -> Image.Image:
    """``per_family`` scenes of each image family; the right answer is marked with a star."""
    cells = [(name, i) for name in image_families() for i in range(per_family)]
    rows = -(-len(cells) // columns)
    page = Image.new("RGB", (columns * WIDTH, rows * HEIGHT), (255, 255, 255))
    draw = ImageDraw.Draw(page)
    for n, (name, i) in enumerate(cells):
        x, y = (n % columns) * WIDTH + 6, (n // columns) * HEIGHT + 6
        scene = sample(seed, i, split, family=name)
        if scene.image is None:
            continue
        page.paste(scene.image.resize((SIDE * ZOOM, SIDE * ZOOM), Image.Resampling.NEAREST), (x, y))
        lines = [f"[{name}]"]
        for question in scene.questions[:2]:
            lines += textwrap.wrap(question.question, 42)
            marks = [("*" if k == question.answer else "") + c for k, c in enumerate(question.choices)]
            lines += textwrap.wrap("   " + " | ".join(marks), 46)
        if scene.questions[0].hint:
            lines += textwrap.wrap("hint: " + scene.questions[0].hint, 42)
        draw.multiline_text((x + SIDE * ZOOM + 10, y), "\n".join(lines), fill=(0, 0, 0), font=font(12))
    return page.quantize(128)
