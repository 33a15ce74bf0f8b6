"""Questions whose answer is one fact in a short text, or follows from two of them."""

from __future__ import annotations

from qapbench.tasks.diagramqa.scene import Scene

from .base import Asker, Rng, draw_some, family, listed, pick

NAMES = listed(
    "Anna Ben Carl Dana Eve Finn Gina Hugo Ida Jack Kim Liam Mia Nora Omar Pam Rosa Sam Tina "
    "Vera Will Zoe Amy Bob Lucy Max Lily Tom"
)
KINDS: dict[str, tuple[str, str, str, list[str]]] = {
    # topic: (the fact, the question about its value, the question about its person, possible values)
    "where people live": (
        "{n} lives in the {v}.",
        "Where does {n} live?",
        "Who lives in the {v}?",
        listed("desert city forest mountains village valley cave jungle tower harbor"),
    ),
    "jobs": (
        "{n} is a {v}.",
        "What is the job of {n}?",
        "Who is a {v}?",
        listed("farmer baker doctor teacher pilot singer painter driver cook nurse"),
    ),
    "goods": (
        "{n} sells {v}.",
        "What does {n} sell?",
        "Who sells {v}?",
        listed("bread fish shoes books flowers fruit toys hats lamps honey"),
    ),
    "trade": (
        "{n} wants {v}.",
        "What does {n} want?",
        "Who wants {v}?",
        listed("milk tea salt rice wool gold corn paper glass soap"),
    ),
}


@family("passage", "social science", "text", (2, 8), 1.4)
def passage(rng: Rng, split: str) -> Scene:
    """Tell one fact about each of two or three people, and ask for the fact or for the person."""
    topic = pick(rng, list(KINDS))
    fact, about_value, about_person, values = KINDS[topic]
    k = pick(rng, [2, 2, 3])
    people, things = draw_some(rng, NAMES, k), draw_some(rng, values, k)
    asker = Asker(rng, "passage")
    facts = [fact.format(n=n, v=v) for n, v in zip(people, things, strict=True)]
    asker.hint = " ".join(facts)
    for person, thing in zip(people, things, strict=True):
        asker.ask(topic, [about_value.format(n=person)], thing, things)
        asker.ask(topic, [about_person.format(v=thing)], person, people)
    return asker.scene(split, None, facts, keep=4)


SCARCE = {
    "price": ("The {a} costs {x} dollars.", "costs more", "costs less"),
    "number of people": ("The town of {a} has {x} people.", "has more people", "has fewer people"),
    "area": ("The land of {a} is {x} miles long.", "is longer", "is shorter"),
}
TOWNS = listed("Alton Bristol Camden Dover Essex Florence Granby Hudson Irving Jasper Kent Lowell Milton Norton")
GOODS = listed("chair table lamp book coat hat bag ball kite drum bed clock")


@family("economy", "social science", "text", (7, 12), 1.1)
def economy(rng: Rng, split: str) -> Scene:
    """Give one number for each of two goods or towns, and ask for which of them it is larger or smaller."""
    topic = pick(rng, list(SCARCE))
    fact, more, less = SCARCE[topic]
    things = draw_some(rng, GOODS if topic == "price" else TOWNS, 2)
    # The numbers have different first digits, so that the model has to compare them, but not to calculate.
    digits = draw_some(rng, range(1, 10), 2)
    numbers = [10 * d for d in digits]
    facts = [fact.format(a=a, x=x) for a, x in zip(things, numbers, strict=True)]
    asker = Asker(rng, "economy")
    asker.hint = " ".join(facts)
    high, low = things if numbers[0] > numbers[1] else things[::-1]
    asker.ask(topic, [f"Which one {more}?"], high, things)
    asker.ask(topic, [f"Which one {less}?"], low, things)
    for thing, number in zip(things, numbers, strict=True):
        asker.ask(topic, [f"Which number is given for {thing}?"], str(number), [str(n) for n in numbers])
    return asker.scene(split, None, facts, keep=3)
