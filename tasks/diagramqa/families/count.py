"""Questions that ask to count equal pictures among others."""

from __future__ import annotations

from qapbench.tasks.diagramqa.draw import Canvas, icons
from qapbench.tasks.diagramqa.scene import Scene

from .base import Asker, Rng, draw_some, family, pale

HINTS = ["Count the pictures one by one.", "The picture shows several things."]
NUMBERS = ["1", "2", "3", "4"]


@family("count", "natural science", "image", (1, 2))
def count(rng: Rng, split: str) -> Scene:
    """Draw one to four pictures of each of two things, and ask how many there are of each, and of which more."""
    canvas = Canvas(pale(rng))
    names = draw_some(rng, icons(), 2)
    numbers = [1 + int(rng.integers(4)) for _ in names]
    spots = draw_some(rng, [(17 + 31 * i, 17 + 31 * j) for i in range(3) for j in range(3)], sum(numbers))
    asker = Asker(rng, "count", HINTS)
    facts = []
    used = 0
    boxes = []
    for name, number in zip(names, numbers, strict=True):
        mine = []
        for x, y in spots[used : used + number]:
            dx, dy = rng.integers(-2, 3, 2)
            mine.append(canvas.icon(name, x + int(dx), y + int(dy), 26))
        used += number
        boxes.append(mine)
        other = sum(numbers) - number
        share = "more" if number > other else "fewer" if number < other else "same"
        for box in mine:
            canvas.describe(box, count=str(number), share=share)
        facts.append(f"the number of {name} pictures is {number}.")
        text = [f"How many {name} pictures are there?", f"How many times is the {name} shown?"]
        asker.ask("counting to four", text, str(number), NUMBERS, mine)
        asker.ask("counting to four", text, str(number), NUMBERS, mine, limit=2)
    if numbers[0] != numbers[1]:
        more, fewer = names if numbers[0] > numbers[1] else names[::-1]
        facts.append(f"there are more {more} pictures.")
        asker.ask("more or fewer", ["Which thing is shown more often?"], more, names, boxes[0] + boxes[1])
        asker.ask("more or fewer", ["Which thing is shown less often?"], fewer, names, boxes[0] + boxes[1])
    return asker.scene(split, canvas, facts)
