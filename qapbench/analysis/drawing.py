"""Draws an explanation as one picture. It needs Pillow and no plotting library."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .explain import Explanation, Side

PANEL, GAP, MARGIN = 280, 20, 28  # pixels
INK, SOFT, PAPER, LINE = (27, 31, 36), (98, 106, 116), (252, 252, 251), (217, 221, 226)
GOOD, BAD = (10, 107, 61), (163, 38, 27)
OWN = (255, 140, 40)  # outline of tokens that only this selection keeps
SHARED = (255, 255, 255)  # outline of tokens that both selections keep
VEIL = 0.76  # opacity of the cover over a dropped token, 0 to 1
HEAT = np.array([(38, 22, 72), (92, 42, 130), (178, 52, 110), (236, 100, 66), (252, 178, 60), (250, 248, 200)], float)
"""RGB colours of the heat maps from the lowest score to the highest, evenly spaced; lightness only grows."""


def draw(explanation: Explanation) -> Image.Image:
    """The picture of an explanation: the question, five panels in a row, and the answers.

    The panels are the image, its sensitivity, its relevance, and the two selections.
    """
    question, fused = explanation.question, explanation.sides[-1]
    width = 2 * MARGIN + 5 * PANEL + 4 * GAP
    text = _wrapped(question.text, font_of(15), width - 2 * MARGIN)[:9]
    top = MARGIN + 30 + 21 * len(text) + 20
    foot = _wrapped("\n".join(explanation.notes), font_of(12), width - 2 * MARGIN)
    bars = 52 + 24 * len(question.options)
    height = top + 26 + PANEL + bars + 18 * len(foot) + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    title = f"{explanation.spec.name}: {question.id}"
    pen.text((MARGIN, MARGIN), _cut(title, font_of(19), width - 2 * MARGIN), INK, font_of(19))
    for index, line in enumerate(text):
        pen.text((MARGIN, MARGIN + 32 + 21 * index), line, INK, font_of(15))
    image = explanation.image.resize((PANEL, PANEL), Image.Resampling.LANCZOS)
    grid = fused.grid
    spec = explanation.spec.prune
    panels = [
        ("image", image),
        (f"sensitivity: {spec.sensitivity if spec else ''}", _heat(image, fused.sensitivity, grid)),
        (f"relevance: {spec.method if spec else ''}", _heat(image, fused.relevance, grid)),
        *((_choice(side), kept(image, explanation.sides, place)) for place, side in enumerate(explanation.sides)),
    ]
    for index, (name, panel) in enumerate(panels):
        left = MARGIN + index * (PANEL + GAP)
        pen.text((left, top), _cut(name, font_of(14), PANEL), INK, font_of(14))
        sheet.paste(panel, (left, top + 26))
        pen.rectangle((left - 1, top + 25, left + PANEL, top + 26 + PANEL), outline=LINE)
    below = top + 26 + PANEL + 14
    _legend(pen, MARGIN + PANEL + GAP, below, 2 * PANEL + GAP)
    for place, side in enumerate(explanation.sides):
        _answers(pen, MARGIN + (3 + place) * (PANEL + GAP), below, side, question.options, question.truth)
    pen.text((MARGIN, below), f"truth: {question.truth}", INK, font_of(14))
    for index, line in enumerate(foot):
        pen.text((MARGIN, height - MARGIN - 18 * (len(foot) - index)), line, SOFT, font_of(12))
    return sheet


def heat_colours(scores: np.ndarray) -> np.ndarray:
    """Colours of the heat map: [...] scores in [0, 1] -> [..., 3] RGB values from 0 to 255."""
    place = scores.clip(0, 1) * (len(HEAT) - 1)
    low = np.floor(place).astype(int).clip(max=len(HEAT) - 2)
    share = (place - low)[..., None]
    return HEAT[low] * (1 - share) + HEAT[low + 1] * share


def _heat(image: Image.Image, scores: Tensor | None, grid: tuple[int, int] | None) -> Image.Image:
    """A heat map [PANEL, PANEL] of N scores over the image, or a message if there is nothing to draw.

    Args:
        scores: [N] in [0, 1]; None if the pruner has none.
        grid: (height, width) of the tokens; None if they form no grid.
    """
    if scores is None or grid is None:
        return _message("this pruner has none" if scores is None else "the tokens lie on no grid")
    if scores.min() == scores.max():
        return _message("the same for every token")
    colours = heat_colours(scores.numpy().astype(float).reshape(grid)).astype(np.uint8)
    overlay = Image.fromarray(colours).resize((PANEL, PANEL), Image.Resampling.NEAREST)
    return Image.blend(image.convert("L").convert("RGB"), overlay, 0.74)


def kept(image: Image.Image, sides: Sequence[Side], place: int) -> Image.Image:
    """The image with dropped tokens covered and kept tokens outlined.

    Tokens that only this side keeps have a thick outline in a colour of their own.

    Args:
        image: the image as the model received it, PANEL pixels wide and high.
        sides: both selections.
        place: index of the side to draw.
    """
    grid = sides[place].grid
    if grid is None:
        return _message("the tokens lie on no grid")
    mine, other = (set(side.kept) for side in (sides[place], sides[1 - place]))
    veil = np.full(grid, VEIL)
    veil.flat[sorted(mine)] = 0
    mask = Image.fromarray((veil * 255).astype(np.uint8)).resize((PANEL, PANEL), Image.Resampling.NEAREST)
    panel = Image.composite(Image.new("RGB", image.size, (14, 17, 22)), image, mask)
    pen = ImageDraw.Draw(panel)
    high, wide = PANEL / grid[0], PANEL / grid[1]
    for token in sorted(mine, key=lambda token: token not in other):
        row, column = divmod(token, grid[1])
        box = (column * wide, row * high, (column + 1) * wide - 1, (row + 1) * high - 1)
        own = token not in other
        pen.rectangle(box, outline=OWN if own else SHARED, width=2 if own else 1)
    return panel


def _choice(side: Side) -> str:
    merged = f" + {side.merged} merged" if side.merged else ""
    return f"{side.name}: {len(side.kept)} kept{merged}"


def _answers(pen: ImageDraw.ImageDraw, left: int, top: int, side: Side, options: Sequence[str], truth: str) -> None:
    """Write the answer of one side, and draw a bar for the probability of each option."""
    right = side.answer == truth
    pen.text(
        (left, top), f"answers {side.answer}: {'right' if right else 'wrong'}", GOOD if right else BAD, font_of(15)
    )
    for index, (option, share) in enumerate(zip(options, side.probabilities, strict=True)):
        y = top + 28 + 24 * index
        pen.text((left, y), option, INK, font_of(13))
        pen.rectangle((left + 22, y + 2, left + PANEL - 52, y + 15), fill=LINE)
        filled = left + 22 + round(share * (PANEL - 74))
        pen.rectangle((left + 22, y + 2, max(filled, left + 23), y + 15), fill=GOOD if option == truth else SOFT)
        pen.text((left + PANEL - 46, y), f"{100 * share:.1f} %", INK, font_of(13))


def _legend(pen: ImageDraw.ImageDraw, left: int, top: int, width: int) -> None:
    """Draw the colour scale of both heat maps, and say what the outlines of the selections mean."""
    steps = 96
    for step, colour in enumerate(heat_colours(np.linspace(0, 1, steps))):
        x = left + step * width / steps
        pen.rectangle((x, top + 2, x + width / steps, top + 12), fill=tuple(int(c) for c in colour))
    pen.text((left, top + 16), "lowest of the image", SOFT, font_of(12))
    high = "highest"
    pen.text((left + width - font_of(12).getlength(high), top + 16), high, SOFT, font_of(12))
    pen.rectangle((left, top + 43, left + 12, top + 55), outline=OWN, width=2)
    pen.text((left + 20, top + 41), "kept by this choice only", SOFT, font_of(12))


def _message(text: str) -> Image.Image:
    panel = Image.new("RGB", (PANEL, PANEL), (240, 241, 242))
    ImageDraw.Draw(panel).text((PANEL / 2, PANEL / 2), text, SOFT, font_of(14), anchor="mm")
    return panel


def font_of(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font at a size in pixels.

    Raises:
        RuntimeError: Pillow was built without FreeType.
    """
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType")
    return font


def _cut(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, shortened with dots so that it fits a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The text as lines that fit a width in pixels; a word that is too long is cut."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(_cut(line, font, width))
    return [line for line in lines if line]
