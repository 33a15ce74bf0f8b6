"""Questions about bar magnets: whether they attract or repel each other, and how strong the force is."""

from __future__ import annotations

from qapbench.tasks.diagramqa.draw import COLORS, Canvas, union
from qapbench.tasks.diagramqa.scene import Box, Scene

from .base import Asker, Rng, family, flip, pale, pick

RULE = [
    "Different poles attract. Same poles repel. N is the north pole and S is the south pole.",
    "Two magnets are placed as shown. Different poles pull together. Same poles push apart.",
]
FORCE = [
    "A smaller distance between magnets means a stronger force.",
    "The force between magnets is stronger when they are closer.",
]
POLES = {"N": "north pole", "S": "south pole"}
INK_OF = {"N": COLORS["red"], "S": COLORS["blue"]}


def _bar(canvas: Canvas, x: int, y: int, width: int, height: int, poles: str, upright: bool) -> list[Box]:
    """Draw one magnet.

    Args:
        canvas: what to draw on.
        x: left edge in pixels.
        y: top edge in pixels.
        width: width in pixels.
        height: height in pixels.
        poles: "NS" or "SN": the poles from left to right, or from top to bottom.
        upright: whether the poles are one above the other.

    Returns:
        The boxes of the two poles, in the same order.
    """
    boxes = []
    for i, pole in enumerate(poles):
        if upright:
            box = (x, y + i * height // 2, x + width, y + (i + 1) * height // 2)
        else:
            box = (x + i * width // 2, y, x + (i + 1) * width // 2, y + height)
        canvas.draw.rectangle([box[0], box[1], box[2] - 1, box[3] - 1], fill=INK_OF[pole])
        canvas.text(pole, (box[0] + box[2]) // 2, (box[1] + box[3]) // 2, 16, (255, 255, 255), POLES[pole])
        boxes.append(canvas.thing(POLES[pole], box))
    return boxes


@family("magnets", "natural science", "image", (3, 8), 1.3)
def magnets(rng: Rng, split: str) -> Scene:
    """Draw two bar magnets, side by side or one above the other, and ask about their poles and their force."""
    canvas = Canvas(pale(rng))
    upright = flip(rng)
    first, second = (pick(rng, ["NS", "SN"]) for _ in range(2))
    gap = int(rng.integers(6, 17))
    long, thick = 38, int(rng.integers(18, 25))
    start = (96 - 2 * long - gap) // 2
    across = int(rng.integers(6, 90 - thick))
    if upright:
        one = _bar(canvas, across, start, thick, long, first, True)
        two = _bar(canvas, across, start + long + gap, thick, long, second, True)
    else:
        one = _bar(canvas, start, across, long, thick, first, False)
        two = _bar(canvas, start + long + gap, across, long, thick, second, False)
    inner = [one[1], two[0]]
    asker = Asker(rng, "magnets", RULE, 0.7)
    verb = "attract" if first[1] != second[0] else "repel"
    text = ["Will these magnets attract or repel each other?", "Do the two magnets attract or repel?"]
    asker.ask("attract or repel", text, verb, ["attract", "repel"], inner)
    same = "same" if verb == "repel" else "different"
    text = ["Are the two poles in the middle the same or different?"]
    asker.ask("facing poles", text, same, ["same", "different"], inner)
    sides = ("top", "bottom") if upright else ("left", "right")
    for box, pole, place in zip(
        (*one, *two), first + second, ("first", "inner first", "inner second", "last"), strict=True
    ):
        canvas.describe(box, pole=POLES[pole], end=place, lies="upright" if upright else "flat", verb=verb)
    for pole, side, other, box in (
        (first[1], sides[0], sides[1], one[1]),
        (second[0], sides[1], sides[0], two[0]),
    ):
        text = [f"Which pole of the {side} magnet is closest to the {other} magnet?"]
        asker.ask("closest pole", text, POLES[pole], list(POLES.values()), [box])
    for pole, side, box in ((first[0], sides[0], one[0]), (second[1], sides[1], two[1])):
        text = [f"Which pole is at the {side} end?", f"Which pole is closest to the {side} edge?"]
        asker.ask("end pole", text, POLES[pole], list(POLES.values()), [box])
    facts = [
        f"the {sides[0]} magnet is {first[0]} {first[1]}.",
        f"the {sides[1]} magnet is {second[0]} {second[1]}.",
        f"the poles in the middle are {first[1]} and {second[0]}.",
        f"the middle poles are {'the same' if same == 'same' else same}.",
        f"the magnets {verb}.",
    ]
    return asker.scene(split, canvas, facts)


@family("magnet force", "natural science", "image", (6, 8), 0.8)
def force(rng: Rng, split: str) -> Scene:
    """Draw two pairs of magnets with different gaps, and ask in which pair the force is stronger."""
    canvas = Canvas(pale(rng))
    near, far = int(rng.integers(2, 6)), int(rng.integers(14, 19))
    gaps = [near, far] if flip(rng) else [far, near]
    kind = pick(rng, [("NS", "NS"), ("NS", "SN"), ("SN", "NS"), ("SN", "SN")])
    long = 30
    pairs = []
    for i, gap in enumerate(gaps):
        y = 10 + 46 * i + int(rng.integers(-4, 5))
        start = 15 + (81 - 2 * long - gap) // 2
        number = canvas.text(str(i + 1), 6, y + 13, 18)
        left = _bar(canvas, start, y, long, 26, kind[0], False)
        right = _bar(canvas, start + long + gap, y, long, 26, kind[1], False)
        pairs.append(union(left[0], right[1]))
        near_or_far = "closer" if gap == near else "farther"
        attracts = "attract" if kind[0][1] != kind[1][0] else "repel"
        for box in (number, *left, *right):
            canvas.describe(box, pair=str(i + 1), gap=near_or_far, verb=attracts)
    strong = 1 if gaps[0] == near else 2
    asker = Asker(rng, "magnet force", FORCE, 0.7)
    names = ["Pair 1", "Pair 2"]
    verb = "attract" if kind[0][1] != kind[1][0] else "repel"
    asker.ask(
        "stronger force",
        ["Which pair of magnets has the stronger force?", "In which pair is the magnetic force stronger?"],
        names[strong - 1],
        names,
        pairs,
    )
    asker.ask(
        "weaker force",
        ["Which pair of magnets has the weaker force?", "In which pair is the magnetic force weaker?"],
        names[2 - strong],
        names,
        pairs,
    )
    asker.ask("distance", ["In which pair are the magnets closer together?"], names[strong - 1], names, pairs)
    asker.ask("distance", ["In which pair are the magnets farther apart?"], names[2 - strong], names, pairs)
    asker.ask(
        "attract or repel",
        ["Do the magnets in each pair attract or repel?"],
        verb,
        ["attract", "repel"],
        pairs,
    )
    facts = [
        f"the magnets in pair {strong} are closer.",
        f"the magnets in pair {3 - strong} are farther apart.",
        f"pair {strong} has the stronger force.",
        f"the magnets {verb}.",
    ]
    return asker.scene(split, canvas, facts)
