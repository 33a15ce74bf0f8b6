"""Questions about the guide words of a dictionary page and about alphabetical order."""

from __future__ import annotations

import functools

from qapbench.tasks.diagramqa.draw import icons
from qapbench.tasks.diagramqa.scene import Scene

from .base import Asker, Rng, draw_some, family, pick

MORE = (
    "air arm art baby bank bell bird blue body boat bone bring brown call calm card child city class "
    "clean climb cold cook cool corner cross dance dark deep desk dream dress drive early earth east "
    "empty enter face fall farm fast field fire floor fly forest free friend garden give glad gold grass "
    "great green grow hand happy heart heavy help high hill home hope hot idea ice inside island join "
    "joke jump keep kind king know lake land large laugh leaf learn letter light line long loud make map "
    "mark meet milk mind money month name near neck never new night noise north note ocean offer old open "
    "order paint paper park party path plan play point pond power queen quick quiet race rain reach read "
    "rest rich river road rock room round run sad safe sand school sea send shade shine short silver sing "
    "sleep slow smile snow soft song sound south space spring stand start still stone storm story street "
    "strong summer sweet swim table talk tall teach thick thin time tiny town travel trip under uncle "
    "valley very village visit voice wait walk warm wash water wave week west wide wild wind winter wish "
    "wood word work world write year yell young zero"
)


@functools.cache
def words() -> tuple[str, ...]:
    """All words of the dictionary, in alphabetical order."""
    return tuple(sorted({*MORE.split(), *(name for name in icons() if " " not in name and "-" not in name)}))


@family("dictionary", "language science", "text", (2, 7), 1.2)
def dictionary(rng: Rng, split: str) -> Scene:
    """Ask which word is on the page with given guide words, and which of some words comes first or last."""
    asker = Asker(rng, "dictionary")
    pool = words()
    facts: list[str] = []
    for _ in range(3):
        low = int(rng.integers(0, len(pool) - 60))
        high = low + int(rng.integers(20, 60))
        inside = pool[int(rng.integers(low + 1, high))]
        outside = [w for w in draw_some(rng, pool, 6) if not pool[low] <= w <= pool[high]][:3]
        page = f"{pool[low]} - {pool[high]}"
        text = [
            f"Which word would you find on a dictionary page with the guide words: {page}?",
            f"Which word is on the page with the guide words: {page}?",
        ]
        if outside:
            asker.ask("guide words", text, inside, outside, limit=pick(rng, [2, 3, 4]))
    three = draw_some(rng, pool, pick(rng, [2, 3]))
    asker.ask("alphabetical order", ["Which word comes first in the dictionary?"], min(three), three)
    asker.ask("alphabetical order", ["Which word comes last in the dictionary?"], max(three), three)
    facts.append(" comes before ".join(sorted(three)) + " in the dictionary.")
    return asker.scene(split, None, facts, keep=4)
