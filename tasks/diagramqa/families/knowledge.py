"""Questions to be answered from memory, about the categories of things and about geography."""

from __future__ import annotations

from qapbench.tasks.diagramqa.draw import categories, icons
from qapbench.tasks.diagramqa.scene import Scene

from .base import Asker, Rng, draw_some, family, pick


@family("kind of", "natural science", "text", (1, 6), 1.1)
def kind_of(rng: Rng, split: str) -> Scene:
    """Ask which of several things belongs to a category, or to which category a thing belongs. There is no hint."""
    asker = Asker(rng, "kind of")
    facts = []
    for _ in range(4):
        groups = draw_some(rng, categories(), pick(rng, [2, 3, 4]))
        names = [pick(rng, icons(group)) for group in groups]
        facts.append(f"the {names[0]} is in the group {groups[0]}.")
        if pick(rng, [True, False]):
            text = [
                f"Which of these is in the group {groups[0]}?",
                f"Which thing belongs to the group {groups[0]}?",
            ]
            asker.ask("members of a group", text, names[0], names)
        else:
            text = [f"In which group is the {names[0]}?", f"To which group does the {names[0]} belong?"]
            asker.ask("group of a member", text, groups[0], groups)
    return asker.scene(split, None, facts, keep=4)


CONTINENTS = {
    "Africa": "Egypt Kenya Ghana Nigeria Morocco Mali Chad Angola",
    "Asia": "China India Japan Nepal Iran Thailand Vietnam Mongolia",
    "Europe": "France Spain Italy Germany Poland Greece Norway Sweden",
    "South America": "Brazil Peru Chile Bolivia Ecuador Argentina Colombia Uruguay",
}
CAPITALS = {
    "Texas": "Austin",
    "Ohio": "Columbus",
    "Georgia": "Atlanta",
    "Colorado": "Denver",
    "Arizona": "Phoenix",
    "Massachusetts": "Boston",
    "Utah": "Salt Lake City",
    "Oregon": "Salem",
    "Iowa": "Des Moines",
    "Hawaii": "Honolulu",
    "Indiana": "Indianapolis",
    "Idaho": "Boise",
    "Tennessee": "Nashville",
    "Alaska": "Juneau",
    "Maine": "Augusta",
    "Kansas": "Topeka",
    "Virginia": "Richmond",
    "Nevada": "Carson City",
    "Montana": "Helena",
    "Delaware": "Dover",
}
WHERE = {country: continent for continent, names in CONTINENTS.items() for country in names.split()}


@family("geography", "social science", "text", (3, 9))
def geography(rng: Rng, split: str) -> Scene:
    """Ask for the continents of countries and the capitals of states of the USA. There is no hint."""
    asker = Asker(rng, "geography")
    facts = []
    for _ in range(2):
        country = pick(rng, list(WHERE))
        continent = WHERE[country]
        facts.append(f"{country} is in {continent}.")
        text = [f"In which continent is {country}?", f"Where is {country}?"]
        asker.ask("continents", text, continent, list(CONTINENTS), limit=pick(rng, [2, 3, 4]))
        away = draw_some(rng, [c for c in WHERE if WHERE[c] != continent], 3)
        asker.ask("continents", [f"Which country is in {continent}?"], country, away)
        state, city = pick(rng, list(CAPITALS.items()))
        facts.append(f"{city} is the capital of {state}.")
        asker.ask("capitals", [f"What is the capital of {state}?"], city, list(CAPITALS.values()))
        asker.ask("capitals", [f"{city} is the capital of which state?"], state, list(CAPITALS))
    return asker.scene(split, None, facts, keep=4)
