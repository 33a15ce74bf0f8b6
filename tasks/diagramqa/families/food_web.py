"""Questions about food chains, in which arrows point from the eaten animal to the one that eats it."""

from __future__ import annotations

import math

from qapbench.tasks.diagramqa.draw import Canvas, icons
from qapbench.tasks.diagramqa.scene import Box, Scene

from .base import Asker, Rng, draw_some, family, flip, pale, pick

HINTS = [
    "Each arrow points from the food to the animal that eats it.",
    "In a food web, an arrow goes from what is eaten to the eater.",
]
ARROWS = [(20, 20, 20), (170, 30, 30), (30, 60, 160)]


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


@family("food web", "natural science", "image", (4, 8), 1.3)
def food_web(rng: Rng, split: str) -> Scene:
    """Draw a food chain of three or four animals on the corners of a square, and ask who eats whom."""
    canvas = Canvas(pale(rng))
    length = 3 + int(flip(rng))
    # The chain follows the sides of the square, so that no arrows cross. Its first corner and direction are random.
    corners = [(16, 16), (80, 16), (80, 80), (16, 80)]
    start, sense = int(rng.integers(4)), pick(rng, [1, -1])
    chain = draw_some(rng, icons("animal"), length)
    boxes = []
    for i, name in enumerate(chain):
        x, y = corners[(start + sense * i) % 4]
        dx, dy = (int(v) for v in rng.integers(-3, 4, 2))
        boxes.append(canvas.icon(name, x + dx, y + dy, 28))
    color = pick(rng, ARROWS)
    asker = Asker(rng, "food web", HINTS, 0.7)
    facts = []
    for i in range(length - 1):
        (ax, ay), (bx, by) = _centre(boxes[i]), _centre(boxes[i + 1])
        distance = math.hypot(bx - ax, by - ay)
        ux, uy = (bx - ax) / distance, (by - ay) / distance
        arrow = canvas.arrow((ax + 15 * ux, ay + 15 * uy), (bx - 15 * ux, by - 15 * uy), color)
        food, eater = chain[i], chain[i + 1]
        around = [boxes[i], arrow, boxes[i + 1]]
        facts += [f"the {eater} eats the {food}.", f"an arrow goes from the {food} to the {eater}."]
        rest = [c for c in chain if c != eater]
        asker.ask("prey", [f"What does the {eater} eat?", f"What is the food of the {eater}?"], food, rest, around)
        rest = [c for c in chain if c != food]
        asker.ask("predator", [f"Which animal eats the {food}?", f"What eats the {food}?"], eater, rest, around)
        text = [f"Where does the arrow from the {food} point?", f"To which animal does the {food} arrow go?"]
        asker.ask("arrow", text, eater, rest, around)
        canvas.describe(arrow, eaten=food, eater=eater)
        canvas.describe(boxes[i], eater=eater)
        canvas.describe(boxes[i + 1], eaten=food)
    canvas.describe(boxes[0], role="start")
    canvas.describe(boxes[-1], role="top")
    everything = [*boxes]
    if length == 3:
        text = ["Which animal is the start of the food chain?", "Which animal eats no other animal?"]
        asker.ask("start of the chain", text, chain[0], chain, everything)
        text = ["Which animal is the top of the food chain?", "Which animal is not eaten?"]
        asker.ask("top of the chain", text, chain[-1], chain, everything)
    return asker.scene(split, canvas, facts, keep=6)
