"""Synthetic look-ups: questions in the form of the benchmark's text-only questions, and drills.

All other questions are composed of two look-ups, "which option names this?" and "which value belongs to this key?".
Since keys and values are random words here, nothing can be memorised, and only the look-up itself can be learnt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qapbench.tasks.diagramqa.families.base import draw_some, pick
from qapbench.tasks.diagramqa.scene import Question

FORMS = [
    # (the fact, questions about its value, questions about its key)
    ("The {k} is {v}.", ["What is the {k}?", "Which word fits the {k}?"], ["What is {v}?", "Which one is {v}?"]),
    ("{k} has {v}.", ["What does {k} have?"], ["Who has {v}?", "Which one has {v}?"]),
    ("{k} goes to {v}.", ["Where does {k} go?", "What belongs to {k}?"], ["What goes to {v}?"]),
    ("At {k} is {v}.", ["What is at {k}?", "Which thing is at {k}?"], ["Where is {v}?", "Where is the {v}?"]),
]
EASY, HARD = "find", "lookup"
SAME = ["Which word is {w}?", "Which of these is {w}?", "Find {w}.", "Which option says {w}?"]


def lookup(rng: np.random.Generator, words: list[str], easy: float) -> Question:
    """Draw a look-up question.

    Args:
        rng: random generator.
        words: words that serve as keys, values and options.
        easy: probability of a question that itself contains the answer, so that only the option has to be found.
    """
    options = int(rng.integers(2, 5))
    if rng.random() < easy:
        choices = draw_some(rng, words, options)
        answer = int(rng.integers(options))
        return _question(pick(rng, SAME).format(w=choices[answer]), "", choices, answer, EASY)
    pairs = int(rng.integers(2, 6))
    drawn = draw_some(rng, words, 2 * pairs)
    keys, values = drawn[:pairs], drawn[pairs:]
    fact, about_value, about_key = pick(rng, FORMS)
    hint = " ".join(fact.format(k=k, v=v) for k, v in zip(keys, values, strict=True))
    options = min(options, pairs)
    asked = draw_some(rng, range(pairs), options)
    answer = int(rng.integers(options))
    if rng.random() < 0.5:
        text = pick(rng, about_value).format(k=keys[asked[answer]])
        return _question(text, hint, [values[i] for i in asked], answer)
    text = pick(rng, about_key).format(v=values[asked[answer]])
    return _question(text, hint, [keys[i] for i in asked], answer)


def _question(text: str, hint: str, choices: list[str], answer: int, family: str = HARD) -> Question:
    return Question(text, hint, choices, answer, family, "language science", "grade1", "lookup")


@dataclass
class Drill:
    """A text of facts, followed by words each of which is answered by the word after it: look-ups without questions.

    Attributes:
        facts: the pieces of the text at the start.
        names: the two words of each fact.
        asked: for each word that is asked: (the word, the answer that comes next, the index of the fact that tells it).
        option: whether the facts are options, and the answers are their letters. Otherwise a fact pairs two words, and
            one of them is the answer to the other.
    """

    facts: list[str]
    names: list[tuple[str, str]]
    asked: list[tuple[str, str, int]]
    option: bool


def drill(rng: np.random.Generator, answers: list[str], names: list[str]) -> Drill:
    """Draw a drill with up to twelve answers: letters of options, or words that are paired with other words.

    The decoder learns to look something up only if a text has many targets. It learns that here for words in the text;
    in whole questions, it applies the same to a word that it has predicted itself (`Decoder.say`).

    Args:
        rng: random generator.
        answers: words that serve as options.
        names: words that are paired.
    """
    option = bool(rng.random() < 0.5)
    count = int(rng.integers(2, 6))
    drawn = draw_some(rng, answers if option else names, 2 * count)
    keys, values = drawn[:count], drawn[count:]
    if option:
        shown = [" ".join(pair) for pair in zip(keys, values, strict=True)] if rng.random() < 0.2 else keys
        facts = [f"\n{letter}. {text}" for letter, text in zip("ABCDE", shown, strict=False)]
        asked, answers = [text.split(" ")[-1] for text in shown], list("ABCDE"[:count])
    else:
        fact = pick(rng, FORMS)[0]
        facts = [" " + fact.format(k=k, v=v) for k, v in zip(keys, values, strict=True)]
        asked, answers = (keys, values) if rng.random() < 0.5 else (values, keys)
    order = [int(i) for _ in range(3) for i in rng.permutation(count)][:12]
    names_of = list(zip(keys, values, strict=True))
    return Drill(facts, names_of, [(asked[i], answers[i], i) for i in order], option)
