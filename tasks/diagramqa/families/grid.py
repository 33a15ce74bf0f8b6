"""Questions about places: in coloured grids, and in tables with lettered rows and numbered columns."""

from __future__ import annotations

from qapbench.tasks.diagramqa.draw import CELL_COLORS, INK, Canvas, icons
from qapbench.tasks.diagramqa.scene import Box, Scene

from .base import Asker, Rng, an, draw_some, family, flip, pale, pick

GRID_HINTS = [
    "The picture is a grid of four squares. Each square holds one thing.",
    "Look at the grid. Top is up and bottom is down.",
]
TABLE_HINTS = [
    "The map grid has lettered rows and numbered columns.",
    "Letters name the rows. Numbers name the columns.",
]


@family("position", "social science", "image", (1, 4), 1.4)
def position(rng: Rng, split: str) -> Scene:
    """Draw one thing in each square of a 2 x 2 grid, and ask what is where and what is next to what."""
    canvas = Canvas()
    names = draw_some(rng, icons(), 4)
    colors = draw_some(rng, list(CELL_COLORS), 4)
    cx, cy = (48 + int(v) for v in rng.integers(-6, 7, 2))
    asker = Asker(rng, "position", GRID_HINTS)
    facts: list[str] = []
    boxes: list[Box] = []
    size = int(rng.integers(24, 29))
    for k in range(4):
        row, column = divmod(k, 2)
        x0, x1 = (0, cx) if column == 0 else (cx, 96)
        y0, y1 = (0, cy) if row == 0 else (cy, 96)
        canvas.draw.rectangle([x0, y0, x1 - 1, y1 - 1], fill=CELL_COLORS[colors[k]], outline=INK, width=1)
        dx, dy = rng.integers(-5, 6, 2)
        boxes.append(canvas.icon(names[k], (x0 + x1) // 2 + int(dx), (y0 + y1) // 2 + int(dy), size))
    for k in range(4):
        row, column = divmod(k, 2)
        place = f"{('top', 'bottom')[row]} {('left', 'right')[column]}"
        facts += [f"the {place} square has {an(names[k])}.", f"the {names[k]} is on {colors[k]}."]
        text = [f"What is in the {place} square?", f"Which thing is at the {place}?"]
        asker.ask("corner of a grid", text, names[k], names, [boxes[k]])
        asker.ask("color of a square", [f"What is on the {colors[k]} square?"], names[k], names, [boxes[k]])
        across, down = names[k ^ 1], names[k ^ 2]
        canvas.describe(boxes[k], place=place, color=colors[k], across=across, down=down)
        side, height = ("right", "left")[column], ("below", "above")[row]
        text = [f"What is {side} of the {names[k]}?", f"Which thing is to the {side} of the {names[k]}?"]
        others = [n for n in names if n != names[k]]
        asker.ask("left and right", text, across, others, [boxes[k], boxes[k ^ 1]])
        text = [f"What is {height} the {names[k]}?", f"Which thing is {height} the {names[k]}?"]
        asker.ask("above and below", text, down, others, [boxes[k], boxes[k ^ 2]])
        facts.append(f"the {across} is {side} of the {names[k]}.")
        facts.append(f"the {down} is {height} the {names[k]}.")
    return asker.scene(split, canvas, facts, keep=6)


@family("table", "social science", "image", (2, 6))
def table(rng: Rng, split: str) -> Scene:
    """Draw a table with two lettered rows and two numbered columns, and ask what is in a cell or where a thing is."""
    canvas = Canvas(pale(rng))
    names = draw_some(rng, icons(), 4)
    letters = pick(rng, ["AB", "CD", "XY", "KR"])
    tint = [pick(rng, list(CELL_COLORS.values())) for _ in range(2)]
    asker = Asker(rng, "table", TABLE_HINTS)
    labels = []
    for i in (0, 1):
        canvas.draw.rectangle([20, 20 + 38 * i, 95, 57 + 38 * i], fill=tint[i], outline=INK)
        labels.append(canvas.text(letters[i], 9, 39 + 38 * i, 18))
    canvas.draw.line([58, 20, 58, 95], fill=INK)
    heads = [canvas.text(str(j + 1), 39 + 38 * j, 9, 18) for j in (0, 1)]
    facts = []
    cells = [f"{letters[i]}{j + 1}" for i in (0, 1) for j in (0, 1)]
    for k, name in enumerate(names):
        row, column = divmod(k, 2)
        dx, dy = rng.integers(-4, 5, 2)
        box = canvas.icon(name, 39 + 38 * column + int(dx), 39 + 38 * row + int(dy), 26)
        boxes = [box, labels[row], heads[column]]
        letter = letters[row]
        canvas.describe(box, row=letter, column=str(column + 1))
        facts.append(f"the {name} is in row {letter}, column {column + 1}.")
        text = [f"What is in row {letter}, column {column + 1}?", f"Which thing is at {cells[k]}?"]
        asker.ask("grid lookup", text, name, names, boxes)
        if flip(rng):
            asker.ask("grid place", [f"Where is the {name}?"], cells[k], cells, boxes)
        else:
            asker.ask("grid row", [f"In which row is the {name}?"], letter, list(letters), boxes[:2])
    return asker.scene(split, canvas, facts)
