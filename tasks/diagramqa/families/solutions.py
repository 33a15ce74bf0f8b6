"""Questions about the concentration of particles in two beakers."""

from __future__ import annotations

from qapbench.tasks.diagramqa.draw import COLORS, INK, Canvas
from qapbench.tasks.diagramqa.scene import Box, Scene

from .base import Asker, Rng, draw_some, family, pale, pick

HINTS = [
    "The picture shows two solutions. Each dot is one particle.",
    "More particles in the same volume means a higher concentration.",
]
DOTS = ["red", "blue", "green", "orange", "purple", "pink"]
WATER = (205, 232, 250)


def _beaker(canvas: Canvas, rng: Rng, x: int, count: int, color: str, label: str) -> Box:
    """Draw a beaker with its left edge at `x` and with `count` dots. Returns its box."""
    canvas.draw.rectangle([x, 20, x + 39, 92], fill=(255, 255, 255))
    canvas.draw.rectangle([x, 26, x + 39, 92], fill=WATER)
    canvas.draw.line([(x, 18), (x, 92), (x + 39, 92), (x + 39, 18)], fill=INK, width=2)
    spots = draw_some(rng, [(x + 8 + 12 * i, 35 + 13 * j) for i in range(3) for j in range(5)], count)
    for sx, sy in spots:
        dx, dy = (int(v) for v in rng.integers(-1, 2, 2))
        canvas.draw.ellipse([sx + dx - 4, sy + dy - 4, sx + dx + 4, sy + dy + 4], fill=COLORS[color])
    canvas.text(label, x + 20, 8, 17)
    return canvas.thing("solution", (x, 18, x + 40, 94))


@family("solutions", "natural science", "image", (6, 8), 1.3)
def solutions(rng: Rng, split: str) -> Scene:
    """Draw two solutions with equal or different numbers of particles, and ask which has the higher concentration."""
    canvas = Canvas(pale(rng))
    few, many = int(rng.integers(2, 5)), int(rng.integers(10, 15))
    same = pick(rng, [few, many])
    relation = int(rng.integers(3))
    counts = [(few, many), (many, few), (same, same)][relation]
    color = pick(rng, DOTS)
    names = ["Solution A", "Solution B"]
    shift = int(rng.integers(-2, 3))
    boxes = [_beaker(canvas, rng, x + shift, n, color, s) for x, n, s in zip((4, 52), counts, "AB", strict=True)]
    for box, n, letter in zip(boxes, counts, "AB", strict=True):
        amount = "few" if n == few else "many"
        share = "same" if relation == 2 else "lower" if n == few else "higher"
        canvas.describe(box, label=letter, amount=amount, share=share, color=color)
    asker = Asker(rng, "solutions", HINTS, 0.7)
    higher = ["Solution B", "Solution A", "neither; they are the same"][relation]
    lower = ["Solution A", "Solution B", "neither; they are the same"][relation]
    pool = [*names, "neither; they are the same"]
    for word, answer in (("higher", higher), ("lower", lower)):
        text = [
            f"Which solution has a {word} concentration of {color} particles?",
            f"In which solution is the concentration of particles {word}?",
        ]
        asker.ask(f"{word} concentration", text, answer, pool, boxes)
    for word, answer in (("more", higher), ("fewer", lower)):
        asker.ask(f"{word} particles", [f"Which solution has {word} particles?"], answer, pool, boxes)
    asker.ask("color", ["What color are the particles?"], color, DOTS, boxes)
    for i in (0, 1):
        amount = "few" if counts[i] == few else "many"
        text = [f"Does {names[i]} have few or many particles?"]
        asker.ask("few or many", text, amount, ["few", "many"], [boxes[i]])
    facts = [
        f"Solution A has {'few' if counts[0] == few else 'many'} particles.",
        f"Solution B has {'few' if counts[1] == few else 'many'} particles.",
        f"the particles are {color}.",
        "the solutions are the same." if relation == 2 else f"{higher} has the higher concentration.",
    ]
    return asker.scene(split, canvas, facts, keep=6)
