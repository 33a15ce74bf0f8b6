"""Questions that ask for the name or the category of a pictured thing."""

from __future__ import annotations

from qapbench.tasks.diagramqa.draw import Canvas, categories, category_of, icons
from qapbench.tasks.diagramqa.scene import Scene

from .base import Asker, Rng, an, draw_some, family, flip, pale, pick

LOOK = ["Look at the picture.", "The picture shows some things."]
GROUPS = [
    "A fruit is sweet and holds seeds. An animal can move and eat.",
    "Things can be put into groups. A vehicle carries people. A tool helps with work.",
    "Look at the picture. Think about the group of each thing.",
]
WHERE = {0: "left", 1: "right"}


def _two(rng: Rng) -> tuple[Canvas, list[str], list[tuple[int, int, int, int]]]:
    """Draw one or two icons at random heights, two of them side by side.

    Returns:
        The canvas, and the names and boxes of the icons, from left to right.
    """
    canvas = Canvas(pale(rng))
    k = 1 + int(rng.integers(2))
    names = draw_some(rng, icons(), k)
    boxes = []
    for i, name in enumerate(names):
        middle = 48 if k == 1 else 24 + 48 * i
        spread = 30 if k == 1 else 8
        x = middle + int(rng.integers(-spread, spread + 1))
        y = int(rng.integers(16, 81))
        boxes.append(canvas.icon(name, x, y, int(rng.integers(24, 31))))
    return canvas, names, boxes


@family("identify", "natural science", "image", (1, 4), 1.2)
def identify(rng: Rng, split: str) -> Scene:
    """Draw one or two things, and ask for their names."""
    canvas, names, boxes = _two(rng)
    asker = Asker(rng, "identify", LOOK)
    for i, name in enumerate(names):
        side = WHERE[i]
        canvas.describe(boxes[i], group=category_of(name), side=side if len(names) == 2 else "alone")
        for _ in range(2):
            # The other choices are either all of the answer's category or drawn from all icons. Mixed choices would
            # give the answer away.
            pool = icons(category_of(name)) if flip(rng) else icons()
            pool = [p for p in pool if p not in names]
            if len(names) == 1:
                text = ["What is this?", "What does the picture show?", "Which thing is in the picture?"]
            else:
                text = [f"What is on the {side}?", f"Which thing is on the {side} side of the picture?"]
            asker.ask("name of a thing", text, name, pool, [boxes[i]])
    facts = [f"the picture shows {an(name)}." for name in names]
    if len(names) == 2:
        facts += [f"the {names[0]} is on the left.", f"the {names[1]} is on the right."]
    return asker.scene(split, canvas, facts)


@family("classify", "natural science", "image", (1, 5))
def classify(rng: Rng, split: str) -> Scene:
    """Draw one or two things of different categories, and ask to which category (group) each belongs."""
    canvas = Canvas(pale(rng))
    groups = draw_some(rng, categories(), 1 + int(rng.integers(2)))
    names = [pick(rng, icons(group)) for group in groups]
    asker = Asker(rng, "classify", GROUPS)
    facts = []
    for i, (name, group) in enumerate(zip(names, groups, strict=True)):
        x = int(rng.integers(20, 77)) if len(names) == 1 else 24 + 48 * i + int(rng.integers(-6, 7))
        box = canvas.icon(name, x, int(rng.integers(18, 79)), int(rng.integers(24, 31)))
        canvas.describe(box, group=group, side=WHERE[i] if len(names) == 2 else "alone")
        facts += [f"the picture shows {an(name)}.", f"the {name} is in the group {group}."]
        if len(names) == 1:
            text = ["What group is this thing in?", "Which group does this thing belong to?"]
        else:
            text = [
                f"What group is the thing on the {WHERE[i]} in?",
                f"Which group fits the thing on the {WHERE[i]}?",
            ]
        others = [g for g in categories() if g not in groups]
        asker.ask("groups of things", text, group, others, [box])
        asker.ask("groups of things", text, group, others, [box], limit=3)
    if len(names) == 2:
        boxes = [thing.box for thing in canvas.things]
        for i in (0, 1):
            text = [f"Which side has the thing of the group {groups[i]}?", f"Where is the {groups[i]} thing?"]
            asker.ask("side of a group", text, ["left", "right"][i], ["left", "right"], boxes)
    return asker.scene(split, canvas, facts)
