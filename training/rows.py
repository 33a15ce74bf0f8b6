"""Questions as token rows, with what the training-only losses need to know about each of them.

A row is the text behind the image (or, without an image, the whole prompt), in exactly the form in which the
benchmark asks it, followed by the letter of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor

from qapbench.tasks.diagramqa.scene import Question

from .curriculum import Drill
from .model import BOS, EOS

LETTERS = "ABCDE"
INSTRUCTION = "Answer with the option's letter from the given choices directly."
HEAD = f"{BOS}USER:"


def prompt_text(question: Question, image: bool) -> str:
    """The prompt of lmms-eval's LLaVA-1.5 ScienceQA ("cqm_a") from behind the image, or from behind `HEAD`."""
    hint = f"Context: {question.hint}\n" if question.hint else ""
    options = "\n".join(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(question.choices))
    return f"{chr(10) if image else ' '}{hint}{question.question}\n{options}\n{INSTRUCTION} ASSISTANT:"


@dataclass
class Row:
    """One question.

    Attributes:
        ids: tokens, the answer's letter and the end of the turn last.
        asked: position of the last prompt token, which predicts the letter.
        word: id of the token by which the right choice differs from the others, or -1 where there is none.
        ends: position of the last token of each option.
        answer: index of the right option.
        support: where it is told: in the sentences of the hint that name the right choice (those of them that the
            question names too, if it names any; where no sentence names the choice, the one that the question names
            last), a number's first digit, or the last token that is of a choice or of the question. Without a hint
            the right choice itself; for an image, the words of the question that name something shown.
        told: for each sentence of a hint, its token of that kind, where it has one, and the word that it is about.
        question: positions of the question proper.
        named: position of every such word, and the patches that it names.
    """

    ids: list[int]
    asked: int
    word: int
    ends: list[int]
    answer: int
    support: list[int]
    question: range
    told: list[tuple[int, int]]
    named: list[tuple[int, Tensor]] = field(default_factory=list)


class Speller:
    """Turns questions into rows under one tokenizer."""

    def __init__(self, bpe: Tokenizer) -> None:
        self.bpe = bpe
        self.head = self.ids(HEAD)
        self.image_head = self.ids(f"{HEAD} ")

    def ids(self, text: str) -> list[int]:
        """Token ids without added special tokens."""
        return self.bpe.encode(text, add_special_tokens=False).ids

    def key(self, question: Question) -> int:
        """The first token of the right choice that no other choice has; -1 where there is none."""
        spelled = [self.ids(f" {choice}") for choice in question.choices]
        others = {t for i, choice in enumerate(spelled) if i != question.answer for t in choice}
        return next((t for t in spelled[question.answer] if t not in others), -1)

    def row(self, question: Question, image: bool) -> Row:
        """The row of a question; without an image it starts at `HEAD`."""
        text = prompt_text(question, image)
        encoded = self.bpe.encode(text, add_special_tokens=False)
        stops = [stop for _, stop in encoded.offsets]
        at, ends = text.rindex(f"\n{LETTERS[0]}. "), []
        asked_from, until = text.index(question.question), at
        for letter, choice in zip(LETTERS, question.choices, strict=False):
            at += len(f"\n{letter}. {choice}")
            ends.append(stops.index(at))
        shift = 0 if image else len(self.head)
        word = self.key(question)
        support, told = self._support(encoded.ids, stops, text, question)
        ids = ([] if image else self.head) + encoded.ids
        answer = self.ids(f" {LETTERS[question.answer]}{EOS}")
        inside = [i + shift for i, stop in enumerate(stops) if asked_from < stop <= until]
        return Row(
            ids + answer,
            len(ids) - 1,
            word,
            [e + shift for e in ends],
            question.answer,
            [s + shift for s in support or ends[question.answer :][: word >= 0]],
            range(inside[0], inside[-1] + 1),
            [(end + shift, subject + shift) for end, subject in told],
        )

    def _support(
        self, ids: list[int], stops: list[int], text: str, question: Question
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """`Row.support` and `Row.told` of a question with a hint."""
        word, asked_from = self.key(question), text.index(question.question)
        head = text.index(question.hint) if question.hint else asked_from
        sentences: list[list[int]] = [[]]
        for i, stop in enumerate(stops):
            if head < stop < asked_from:
                sentences[-1].append(i)
                if text[stop - 1] in ".\n":
                    sentences.append([])
        spelled = [[ids[at] for at in sentence] for sentence in sentences if sentence]
        asked = self.ids(f" {question.question}")
        digits, stop_mark = set(self.ids("123456789")), self.ids(".")[0]
        telling = {word, *asked, *(t for choice in question.choices for t in self.ids(f" {choice}"))} - {stop_mark}
        right, both, latest, told = list[int](), list[int](), list[tuple[int, int]](), list[tuple[int, int]]()
        for mine, sentence in zip(spelled, sentences, strict=False):
            others = [other for other in spelled if other is not mine]
            ends = [at for at, token in zip(sentence, mine, strict=True) if token in telling]
            end = next((at for at, token in zip(sentence, mine, strict=True) if token in digits), max(ends, default=-1))
            alone = [i for i, token in enumerate(asked) if token in set(mine).difference(*others, {stop_mark})]
            if word in mine:
                right.append(end)
                both += [end] * bool(alone)
            latest.append((max(alone, default=-1), end))
            # What a sentence is about is where it begins to differ from the others.
            subject = next((i for i, token in enumerate(mine) if all(token not in o[i : i + 1] for o in others)), 0)
            if others and end > sentence[subject]:
                told.append((end, sentence[subject]))
        found = both or right or [end for at, end in latest if 0 <= at == max(latest)[0]]
        return found, told


@dataclass
class DrillRows:
    """Drills of one batch, padded on the right.

    Attributes:
        ids: [R, L].
        row, at: [Q] where an answer is due: the last token of the word that is asked about.
        answer: [Q] the token that has to come next.
        evidence: [Q] position of the last word of the fact that tells it.
        option: [Q] bool, of which kind the drill is.
        told: [F, 3] row of each fact that pairs two words, and where its last and its first word are.
    """

    ids: Tensor
    row: Tensor
    at: Tensor
    answer: Tensor
    evidence: Tensor
    option: Tensor
    told: Tensor


@dataclass
class Chunk:
    """Rows of similar length, padded on the right.

    Attributes:
        ids: [R, L]; lengths: [R]; image: [R] index of the image a row continues (-1 for text).
        asked, letter, word: [R]; letter is the target token at `asked`.
        ends: [R, 5] positions of the options' last tokens, -1 where there is no such option; answer: [R].
        support: [R, L] bool; patches: [R, n] bool, the patches that the answer depends on.
        naming, seen: [M, 2] row and position of words that name something shown, and [M, n] the patches of it.
    """

    ids: Tensor
    lengths: Tensor
    image: Tensor
    asked: Tensor
    letter: Tensor
    word: Tensor
    ends: Tensor
    answer: Tensor
    support: Tensor
    patches: Tensor
    naming: Tensor
    seen: Tensor


def drill_rows(drills: Sequence[Drill], speller: Speller) -> DrillRows:
    """Drills as token rows: the facts, then word and answer by turns."""
    rows, queries, told = [], [], []
    for r, drill in enumerate(drills):
        ids, ends = list(speller.head), []
        for fact, pair in zip(drill.facts, drill.names, strict=True):
            new, start = speller.ids(fact), len(ids)
            ids += new
            first, last = (speller.ids(f" {name}")[-1] for name in pair)
            ends.append(len(ids) - 1 if drill.option or last not in new else start + new.index(last))
            if not drill.option and first in new and start + new.index(first) < ends[-1]:
                told.append((r, ends[-1], start + new.index(first)))
        ids += speller.ids(f"\n{INSTRUCTION}" if drill.option and r % 2 else "\n")
        for word, answer, which in drill.asked:
            ids += speller.ids(f" {word}")
            token = speller.ids(f" {answer}")[0]
            queries.append((r, len(ids) - 1, token, ends[which], drill.option))
            ids.append(token)
        rows.append(ids)
    padded = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for r, tokens in enumerate(rows):
        padded[r, : len(tokens)] = torch.tensor(tokens)
    who, at, due, evidence, option = (torch.tensor(column) for column in zip(*queries, strict=True))
    return DrillRows(padded, who, at, due, evidence, option, torch.tensor(told).view(-1, 3))


def chunk(rows: Sequence[Row], images: Sequence[int], patches: Sequence[Tensor]) -> Chunk:
    """Rows as one padded chunk."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    support = torch.zeros(len(rows), longest, dtype=torch.bool)
    ends = torch.full((len(rows), len(LETTERS)), -1)
    for r, row in enumerate(rows):
        ids[r, : len(row.ids)] = torch.tensor(row.ids)
        support[r, row.support] = True
        ends[r, : len(row.ends)] = torch.tensor(row.ends)
    asked = torch.tensor([row.asked for row in rows])
    naming = [(r, at) for r, row in enumerate(rows) for at, _ in row.named]
    seen = [marks for row in rows for _, marks in row.named]
    return Chunk(
        ids,
        torch.tensor([len(row.ids) for row in rows]),
        torch.tensor(images),
        asked,
        ids.gather(1, asked[:, None] + 1)[:, 0],
        torch.tensor([row.word for row in rows]),
        ends,
        torch.tensor([row.answer for row in rows]),
        support,
        torch.stack(list(patches)),
        torch.tensor(naming).view(-1, 2),
        torch.stack(seen or list(patches))[: len(naming)],
    )
