"""Questions of language science, without image or hint.

They are about rhymes, kinds of sentences, tenses, capital letters, prefixes and figures of speech.
"""

from __future__ import annotations

from qapbench.tasks.diagramqa.scene import Scene

from .base import Asker, Rng, an, draw_some, family, listed, pick
from .passage import NAMES

RHYMES = [
    group.split()
    for group in listed(
        "cat hat bat mat rat,dog log fog frog,sun run fun bun,cake lake snake rake,"
        "ring king sing wing,tree bee sea knee,night light kite bite,ball wall tall fall,"
        "boat goat coat,hen pen ten men,house mouse,moon spoon noon,rain train chain,"
        "bed red sled,rock sock clock,star car jar,nose rose hose,pan can fan man,book hook cook,"
        "fish dish wish",
        ",",
    )
]


@family("rhyme", "language science", "text", (1, 4), 0.8)
def rhyme(rng: Rng, split: str) -> Scene:
    """Ask which word rhymes with a given word."""
    asker = Asker(rng, "rhyme")
    facts = []
    for _ in range(3):
        groups = draw_some(rng, RHYMES, 4)
        first, second = draw_some(rng, groups[0], 2)
        others = [pick(rng, group) for group in groups[1:]]
        facts.append(f"{first} rhymes with {second}.")
        text = [f"Which word rhymes with {first}?", f"Which word sounds like {first}?"]
        asker.ask("rhyming words", text, second, others, limit=pick(rng, [2, 3, 4]))
    return asker.scene(split, None, facts, keep=3)


WHO = listed(
    "the dog,the girl,the boy,my friend,the teacher,the baby,our uncle,the farmer,the nurse,my sister",
    ",",
)
VERBS = {
    # base form: (past tense, object)
    "open": ("opened", "the door"),
    "clean": ("cleaned", "the room"),
    "paint": ("painted", "the wall"),
    "wash": ("washed", "the car"),
    "cook": ("cooked", "the soup"),
    "help": ("helped", "the old man"),
    "watch": ("watched", "the birds"),
    "climb": ("climbed", "the hill"),
    "carry": ("carried", "the box"),
    "kick": ("kicked", "the ball"),
    "visit": ("visited", "the town"),
    "play": ("played", "a song"),
}
WHEN = listed("today,in the garden,at school,on the farm,with care,after lunch,in the rain,at home", ",")
SENTENCES = ["asking sentence", "telling sentence", "command", "exclamation"]


@family("sentences", "language science", "text", (2, 7), 1.0)
def sentences(rng: Rng, split: str) -> Scene:
    """Ask of which kind a sentence is: asking, telling, a command or an exclamation."""
    asker = Asker(rng, "sentences")
    facts = []
    for _ in range(3):
        kind = pick(rng, SENTENCES)
        who, (verb, (past, thing)), when = pick(rng, WHO), pick(rng, list(VERBS.items())), pick(rng, WHEN)
        said = {
            "asking sentence": f"Did {who} {verb} {thing} {when}?",
            "telling sentence": f"{who.capitalize()} {past} {thing} {when}.",
            "command": f"{verb.capitalize()} {thing} {when}.",
            "exclamation": f"Wow, {who} {past} {thing} {when}!",
        }[kind]
        facts.append(f"{said} This is {an(kind)}.")
        text = [f"What kind of sentence is this? {said}", f"Which kind of sentence is it? {said}"]
        asker.ask("kinds of sentences", text, kind, SENTENCES, limit=pick(rng, [2, 3, 4]))
    return asker.scene(split, None, facts, keep=3)


TENSES = ["past tense", "present tense", "future tense"]


@family("tense", "language science", "text", (3, 9), 1.0)
def tense(rng: Rng, split: str) -> Scene:
    """Ask whether a sentence is in the past, present or future tense."""
    asker = Asker(rng, "tense")
    facts = []
    for _ in range(3):
        who = pick(rng, [*WHO, "my friends"])
        verb, (past, thing) = pick(rng, [v for v in VERBS.items() if v[0] not in ("watch", "wash", "carry")])
        kind = pick(rng, TENSES)
        now = verb if who == "my friends" else verb + "s"
        form = dict(zip(TENSES, (past, now, "will " + verb), strict=True))[kind]
        when = pick(rng, WHEN[1:])
        said = f"{who.capitalize()} {form} {thing} {when}."
        facts.append(f"{said} It is in the {kind}.")
        asker.ask("verb tense", [f"Which tense does the sentence use? {said}"], kind, TENSES)
    return asker.scene(split, None, facts, keep=3)


TITLES = listed("North South River Ocean Garden Winter Summer Forest Island Valley Mountain School")


@family("capitals", "language science", "text", (2, 6), 0.6)
def capitals(rng: Rng, split: str) -> Scene:
    """Ask in which spelling a name of two words has the correct capital letters."""
    asker = Asker(rng, "capitals")
    for _ in range(3):
        a, b = pick(rng, NAMES), pick(rng, TITLES)
        wrong = [f"{a.lower()} {b}", f"{a} {b.lower()}", f"{a.lower()} {b.lower()}"]
        text = ["Which name is written correctly?", "Which name has the correct capital letters?"]
        asker.ask("capital letters", text, f"{a} {b}", wrong, limit=pick(rng, [2, 3]))
    return asker.scene(split, None, [], keep=3)


PARTS = {
    "re": ("again", "read write build open start tell play use make fill"),
    "un": ("not", "happy kind fair safe able clear even true well sure"),
    "pre": ("before", "heat pay view cook school test game plan wash set"),
    "mis": ("wrongly", "spell read place use match label count lead judge print"),
    "over": ("too much", "eat cook sleep work load pay fill heat use do"),
}
FIGURES = ["simile", "hyperbole", "personification", "alliteration"]
LIKE = {
    "fast": "the wind",
    "cold": "ice",
    "quiet": "a mouse",
    "strong": "an ox",
    "bright": "the sun",
    "tall": "a tree",
}
HUMAN = ["danced", "sang", "smiled", "whispered", "laughed", "slept"]
NATURE = ["the wind", "the sun", "the moon", "the river", "the old house", "the clock"]
ECHO = [
    "big brown bears bake bread",
    "seven silly sheep sing songs",
    "ten tiny tigers talk",
    "happy hens have hats",
    "pretty pink pigs play",
    "four funny foxes fly",
]


@family("word parts", "language science", "text", (7, 12), 0.9)
def word_parts(rng: Rng, split: str) -> Scene:
    """Ask what the prefix of a word means."""
    asker = Asker(rng, "word parts")
    facts = []
    meanings = [meaning for meaning, _ in PARTS.values()]
    for _ in range(3):
        part = pick(rng, list(PARTS))
        meaning, stems = PARTS[part]
        stem = pick(rng, stems.split())
        facts.append(f"{part}- in {part}{stem} means {meaning}.")
        text = [
            f"What does {part}- mean in {part}{stem}?",
            f"What is the meaning of {part}- in the word {part}{stem}?",
        ]
        asker.ask("prefixes", text, meaning, meanings, limit=pick(rng, [2, 3, 4]))
    return asker.scene(split, None, facts, keep=3)


@family("figures of speech", "language science", "text", (7, 12), 0.9)
def figures(rng: Rng, split: str) -> Scene:
    """Ask which figure of speech a sentence uses."""
    asker = Asker(rng, "figures of speech")
    facts = []
    for _ in range(3):
        kind, name, where = pick(rng, FIGURES), pick(rng, NAMES), pick(rng, WHEN)
        word, what = pick(rng, list(LIKE.items()))
        said = {
            "simile": f"{name} is as {word} as {what} {where}.",
            "hyperbole": f"{name} waited a {pick(rng, ['million', 'billion', 'thousand'])} years {where}.",
            "personification": f"{pick(rng, NATURE).capitalize()} {pick(rng, HUMAN)} to {name} {where}.",
            "alliteration": f"{pick(rng, ECHO).capitalize()} {where}.",
        }[kind]
        facts.append(f"{said} This is {kind}.")
        asker.ask("figures of speech", [f"Which figure of speech is this? {said}"], kind, draw_some(rng, FIGURES, 4))
    return asker.scene(split, None, facts, keep=3)
