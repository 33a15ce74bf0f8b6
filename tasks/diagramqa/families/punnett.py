"""Questions that ask to read or count the genotypes in the 2 x 2 boxes of a Punnett square."""

from __future__ import annotations

from qapbench.tasks.diagramqa.draw import CELL_COLORS, INK, Canvas
from qapbench.tasks.diagramqa.scene import Box, Scene

from .base import Asker, Rng, family, flip, pale, pick

HINTS = [
    "The Punnett square shows the offspring of two parents.",
    "Each box of the Punnett square is one possible offspring.",
]
PLACES = ["top left", "top right", "bottom left", "bottom right"]
ORDER = [0, 1, 2, 3]


def _cross(rng: Rng, big: str) -> tuple[list[str], list[str]]:
    """Draw two random parents and derive their four offspring.

    Args:
        rng: random generator of the scene.
        big: the capital letter of the gene.

    Returns:
        The genotypes of the parents, and those of the offspring, row by row.
    """
    small = big.lower()
    # A mixed pair occurs in both orders. Otherwise the top left box would hold the dominant pair more often.
    parents = [pick(rng, [big * 2, pick(rng, [big + small, small + big]), small * 2]) for _ in range(2)]
    return parents, ["".join(sorted(parents[0][j] + parents[1][i])) for i in (0, 1) for j in (0, 1)]


@family("punnett", "natural science", "image", (9, 12), 1.4)
def punnett(rng: Rng, split: str) -> Scene:
    """Draw a Punnett square of a gene with two alleles, and ask to read one genotype or to count one of them."""
    canvas = Canvas(pale(rng))
    big = pick(rng, "ABDEFGHR")
    kinds = [big * 2, big + big.lower(), big.lower() * 2]
    # The answer is drawn first, and then crosses until one of them fits it. If only the cross were drawn, some answers
    # would be more frequent than others, and a model that does not see the square could gain from that.
    kind, place = pick(rng, kinds), pick(rng, ORDER)
    reading = flip(rng, 0.35)
    pool = [0, 2, 4] if kind == kinds[1] else [0, 1, 2, 4]
    number = pick(rng, pool)
    parents, cells = _cross(rng, big)
    while (cells[place] != kind) if reading else (cells.count(kind) != number):
        parents, cells = _cross(rng, big)

    tint = pick(rng, list(CELL_COLORS.values()))
    left, top = 22 + int(rng.integers(-1, 1)), 22 + int(rng.integers(-1, 1))
    for j in (0, 1):
        canvas.text(parents[0][j], left + 18 + 37 * j, 10, 18, (190, 30, 30))
        canvas.text(parents[1][j], 10, top + 18 + 37 * j, 18, (30, 60, 190))
    boxes: list[Box] = []
    for k, pair in enumerate(cells):
        x, y = left + 37 * (k % 2), top + 37 * (k // 2)
        canvas.draw.rectangle([x, y, x + 36, y + 36], fill=tint, outline=INK, width=2)
        canvas.text(pair, x + 18, y + 18, 20, INK, pair)
        boxes.append(canvas.thing("box", (x, y, x + 37, y + 37)))
        numbers = {f"number {n}": str(cells.count(name)) for n, name in enumerate(kinds)}
        canvas.describe(boxes[-1], place=PLACES[k], genotype=pair, **numbers)
    asker = Asker(rng, "punnett", HINTS)
    if reading:
        for wording in ("Which genotype is in the {} box?", "What is in the {} box of the Punnett square?"):
            asker.ask("read a genotype", [wording.format(PLACES[place])], kind, kinds, [boxes[place]])
    else:
        text = [f"How many boxes have the genotype {kind}?", f"In how many boxes is {kind}?"]
        asker.ask("count genotypes", text, str(number), [str(n) for n in pool], boxes)
        text = [
            f"What is the probability that an offspring has the genotype {kind}?",
            f"What is the probability of the genotype {kind}?",
        ]
        asker.ask("probability", text, f"{number}/4", [f"{n}/4" for n in pool], boxes)
    facts = [f"the number of {name} boxes is {cells.count(name)}." for name in kinds]
    facts += [f"the {PLACES[k]} box is {cells[k]}." for k in ORDER]
    return asker.scene(split, canvas, facts)
