"""Questions about maps of four coloured states that meet in one point."""

from __future__ import annotations

from qapbench.tasks.diagramqa.draw import COLORS, INK, Canvas
from qapbench.tasks.diagramqa.scene import Box, Scene

from .base import Asker, Rng, draw_some, family, listed

HINTS = [
    "On the map, north is up, south is down, west is left and east is right.",
    "The map shows four states. Each state has a letter.",
]
LETTERS = list("ABCDEFGHKLMPRTXZ")
STATES = listed("red blue green yellow orange purple pink gray")
DARK = {"red", "blue", "purple"}
PLACES = ["north west", "north east", "south west", "south east"]


@family("map", "social science", "image", (2, 5), 1.3)
def states(rng: Rng, split: str) -> Scene:
    """Draw a map of four states with letters, and ask for their colours, letters and compass directions."""
    canvas = Canvas((190, 225, 245))
    letters = draw_some(rng, LETTERS, 4)
    colors = draw_some(rng, STATES, 4)
    low, high = 3, 93
    mid = [[int(v) for v in rng.integers(42, 55, 2)] for _ in range(2)]
    edge = [int(v) for v in rng.integers(-3, 4, 8)]
    centre = (mid[0][0], mid[0][1])
    north, south = (mid[1][0], low + 2), (96 - mid[1][0], high - 2)
    west, east = (low + 2, mid[1][1]), (high - 2, 96 - mid[1][1])
    corner = [
        (low + 3 + edge[0], low + 3 + edge[1]),
        (high - 3 + edge[2], low + 3 + edge[3]),
        (low + 3 + edge[4], high - 3 + edge[5]),
        (high - 3 + edge[6], high - 3 + edge[7]),
    ]
    shapes = [
        [corner[0], north, centre, west],
        [corner[1], north, centre, east],
        [corner[2], south, centre, west],
        [corner[3], south, centre, east],
    ]
    asker = Asker(rng, "map", HINTS)
    facts: list[str] = []
    boxes: list[Box] = []
    for k, shape in enumerate(shapes):
        canvas.draw.polygon(shape, fill=COLORS[colors[k]], outline=INK, width=2)
        xs, ys = [p[0] for p in shape], [p[1] for p in shape]
        boxes.append(canvas.thing(f"{colors[k]} state", (min(xs), min(ys), max(xs) + 1, max(ys) + 1)))
        ink = (255, 255, 255) if colors[k] in DARK else INK
        label = canvas.text(letters[k], sum(xs) // 4, sum(ys) // 4, 20, ink)
        for box in (boxes[k], label):
            canvas.describe(
                box, label=letters[k], color=colors[k], place=PLACES[k], across=letters[k ^ 1], down=letters[k ^ 2]
            )
    for k in range(4):
        row, column = divmod(k, 2)
        me = letters[k]
        others = [x for x in letters if x != me]
        across, down = k ^ 1, k ^ 2
        way, height = ("east", "west")[column], ("south", "north")[row]
        asker.ask("state color", [f"What color is state {me}?"], colors[k], colors, [boxes[k]])
        asker.ask(
            "state color",
            [f"Which state is {colors[k]}?", f"Which letter is on the {colors[k]} state?"],
            me,
            letters,
            [boxes[k]],
        )
        asker.ask("part of a map", [f"Which state is in the {PLACES[k]}?"], me, letters, [boxes[k]])
        for other, direction in ((across, way), (down, height)):
            text = [
                f"Which state is {direction} of state {me}?",
                f"What is to the {direction} of state {me}?",
            ]
            asker.ask("compass", text, letters[other], others, [boxes[k], boxes[other]])
            facts.append(f"state {letters[other]} is {direction} of state {me}.")
        facts += [f"state {me} is {colors[k]}.", f"state {me} is in the {PLACES[k]}."]
    return asker.scene(split, canvas, facts, keep=6)
