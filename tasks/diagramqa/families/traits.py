"""Questions about genes, for which the hint states a rule, and about the states of matter, without a hint."""

from __future__ import annotations

from qapbench.tasks.diagramqa.scene import Scene

from .base import Asker, Rng, draw_some, family, listed, pick

BEASTS = listed("rabbit horse mouse cat dog sheep goat cow fox hamster")
LOOKS = {
    "fur color": ["black", "brown", "white", "gray", "red"],
    "eye color": ["blue", "green", "brown", "yellow", "gray"],
    "ear shape": ["long", "short", "round"],
    "tail length": ["long", "short", "curly"],
}


@family("traits", "natural science", "text", (8, 12), 1.2)
def traits(rng: Rng, split: str) -> Scene:
    """State which trait the dominant and the recessive allele of a gene give, and ask for traits and genotypes."""
    beast, trait = pick(rng, BEASTS), pick(rng, list(LOOKS))
    strong, weak = draw_some(rng, LOOKS[trait], 2)
    big = pick(rng, "ABDEFGHLR")
    small = big.lower()
    asker = Asker(rng, "traits")
    asker.hint = f"Gene {big} gives a {beast} the {trait} {strong}. Gene {small} gives {weak}. {big} is dominant."
    facts = [f"The {trait} with {big}{big} is {strong}.", f"The {trait} with {small}{small} is {weak}."]
    # Only the recessive pair gives the recessive trait. It is listed twice, so that both answers are equally frequent.
    pair = pick(rng, [big + big, big + small, small + small, small + small])
    shown = weak if pair == small * 2 else strong
    text = [f"A {beast} has the genes {pair}. What is its {trait}?"]
    asker.ask("genotype to trait", text, shown, [strong, weak])
    look = pick(rng, [strong, weak])
    text = [f"Which genes give a {beast} the {trait} {look}?"]
    pure = [big * 2, small * 2]
    asker.ask("trait to genotype", text, pure[look == weak], pure)
    look = pick(rng, [strong, weak])
    text = [f"Which gene gives the {trait} {look}?"]
    asker.ask("alleles", text, big if look == strong else small, [big, small])
    return asker.scene(split, None, facts, keep=3)


MATTER = {
    "solid": "a rock,a coin,a brick,a spoon,a key,a chair,a hammer,a shell,a stone wall,a glass bottle",
    "liquid": "milk,tea,juice,rain,coffee,honey,vinegar,oil,ink,sea water",
    "gas": "air,steam,helium in a balloon,oxygen,the air in a tire,the air in a room,smoke,hydrogen",
}
STATE = {thing: state for state, things in MATTER.items() for thing in things.split(",")}


@family("matter", "natural science", "text", (5, 9), 0.8)
def matter(rng: Rng, split: str) -> Scene:
    """Ask whether a substance is a solid, a liquid or a gas, or which of several is one. There is no hint."""
    asker = Asker(rng, "matter")
    facts = []
    for _ in range(3):
        state = pick(rng, list(MATTER))
        thing = pick(rng, MATTER[state].split(","))
        facts.append(f"{thing} is a {state}.")
        text = [f"Is {thing} a solid, a liquid, or a gas?", f"Which state of matter is {thing}?"]
        asker.ask("states of matter", text, state, list(MATTER))
        away = draw_some(rng, [t for t in STATE if STATE[t] != state], 3)
        asker.ask("states of matter", [f"Which of these is a {state}?"], thing, away, limit=pick(rng, [2, 3, 4]))
    return asker.scene(split, None, facts, keep=3)
