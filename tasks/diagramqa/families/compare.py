"""Comparisons of two numbers from natural science, which the hint gives."""

from __future__ import annotations

from qapbench.tasks.diagramqa.scene import Scene

from .base import Asker, Rng, draw_some, family, listed, pick

KINDS: dict[str, tuple[str, str, str, list[str]]] = {
    "temperature": (
        "The {a} is {x} degrees.",
        "hotter",
        "colder",
        listed("soup tea milk water sand oven room stone pan cake"),
    ),
    "mass": (
        "The {a} has a mass of {x} grams.",
        "heavier",
        "lighter",
        listed("ball cup brick spoon shoe book apple coin box key"),
    ),
    "speed": (
        "The {a} moves {x} miles an hour.",
        "faster",
        "slower",
        listed("car bus train horse dog boat truck bird fish plane"),
    ),
    "size": (
        "The {a} is {x} feet tall.",
        "taller",
        "shorter",
        listed("tree house tower wall hill fence door statue tent pole"),
    ),
}


@family("compare", "natural science", "text", (3, 8), 1.1)
def compare(rng: Rng, split: str) -> Scene:
    """Give one number for each of two things, and ask which thing is hotter, heavier, faster or taller."""
    topic = pick(rng, list(KINDS))
    fact, more, less, pool = KINDS[topic]
    things = draw_some(rng, pool, 2)
    numbers = [10 * d for d in draw_some(rng, range(1, 10), 2)]
    facts = [fact.format(a=a, x=x) for a, x in zip(things, numbers, strict=True)]
    asker = Asker(rng, "compare")
    asker.hint = " ".join(facts)
    high, low = things if numbers[0] > numbers[1] else things[::-1]
    asker.ask(topic, [f"Which is {more}?", f"Which thing is {more}?"], high, things)
    asker.ask(topic, [f"Which is {less}?", f"Which thing is {less}?"], low, things)
    facts += [f"The {high} is {more}.", f"The {low} is {less}."]
    for thing, number in zip(things, numbers, strict=True):
        asker.ask(topic, [f"Which number is given for the {thing}?"], str(number), [str(n) for n in numbers])
    return asker.scene(split, None, facts, keep=3)
