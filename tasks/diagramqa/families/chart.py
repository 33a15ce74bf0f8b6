"""Questions about bar charts, whose bars are labelled with letters or icons."""

from __future__ import annotations

from qapbench.tasks.diagramqa.draw import COLORS, INK, Canvas, icons
from qapbench.tasks.diagramqa.scene import Box, Scene

from .base import Asker, Rng, draw_some, family, flip, listed, pale

HINTS = [
    "The bar chart shows how many points each player has.",
    "Look at the bar chart. A taller bar means more points.",
]
BARS = listed("red blue green orange purple brown gray yellow")
LETTERS = list("ABCDEFGHKLMPRTXZ")


@family("chart", "social science", "image", (3, 9), 1.2)
def chart(rng: Rng, split: str) -> Scene:
    """Draw three or four bars with different values from 1 to 6, and ask for values, colours and comparisons.

    In half of the charts, each bar has its value written above it.
    """
    canvas = Canvas(pale(rng))
    k = 3 + int(flip(rng))
    pictures = flip(rng, 0.35)
    labels = draw_some(rng, icons() if pictures else LETTERS, k)
    colors = draw_some(rng, BARS, k)
    values = draw_some(rng, range(1, 7), k)
    numbers = flip(rng)
    base = 70 if pictures else 76
    unit = (base - (18 if numbers else 4)) / 6
    step = 96 // k
    asker = Asker(rng, "chart", HINTS)
    who = [f"the {name}" if pictures else name for name in labels]
    boxes: list[Box] = []
    facts: list[str] = []
    for i in range(k):
        x = step * i + step // 2 + (96 - step * k) // 2
        height = round(values[i] * unit)
        canvas.draw.rectangle([x - 8, base - height, x + 8, base], fill=COLORS[colors[i]], outline=INK)
        boxes.append(canvas.thing(f"{colors[i]} bar", (x - 8, base - height, x + 9, base + 1)))
        size = min(24, step - 2)
        label = canvas.icon(labels[i], x, 84, size) if pictures else canvas.text(labels[i], x, 87, 17)
        rank = sorted(values).index(values[i])
        place = "shortest" if rank == 0 else "tallest" if rank == k - 1 else "middle"
        for box in (boxes[i], label):
            canvas.describe(box, label=labels[i], color=colors[i], value=str(values[i]), rank=place)
        if numbers:
            canvas.text(str(values[i]), x, base - height - 8, 15)
        facts += [f"the bar of {who[i]} is {colors[i]}."]
        if numbers:
            facts.append(f"{who[i]} has {values[i]} points.")
            pool = [str(v) for v in range(1, 7)]
            text = [f"How many points does {who[i]} have?", f"What is the value of {who[i]}?"]
            asker.ask("read a value", text, str(values[i]), pool, [boxes[i]])
        asker.ask("bar color", [f"What color is the bar of {who[i]}?"], colors[i], colors, [boxes[i]])
    canvas.draw.line([2, base + 1, 93, base + 1], fill=INK, width=2)
    order = sorted(range(k), key=lambda i: values[i])
    for word, superlative, i in (("most", "tallest", order[-1]), ("fewest", "shortest", order[0])):
        text = [f"Which has the {superlative} bar?", f"Which one has the {word} points?"]
        asker.ask(f"{superlative} bar", text, labels[i], labels, boxes)
        facts.append(f"{who[i]} has the {superlative} bar.")
        text = [f"What color is the {superlative} bar?"]
        asker.ask(f"{superlative} bar", text, colors[i], colors, boxes)
    a, b = draw_some(rng, range(k), 2)
    high, low = (a, b) if values[a] > values[b] else (b, a)
    pair = [labels[a], labels[b]]
    text = [f"Which has more points, {who[a]} or {who[b]}?"]
    asker.ask("compare bars", text, labels[high], pair, [boxes[a], boxes[b]])
    text = [f"Which has fewer points, {who[b]} or {who[a]}?"]
    asker.ask("compare bars", text, labels[low], pair, [boxes[a], boxes[b]])
    facts.append(f"{who[high]} has more points than {who[low]}.")
    return asker.scene(split, canvas, facts, keep=6)
