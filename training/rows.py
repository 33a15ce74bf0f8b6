"""Questions and drills as rows of tokens, with what the losses need to know about each of them.

The row of a question is the text of the prompt that follows the image (or, without an image, the whole prompt), exactly
as in the benchmark, followed by the letter of the answer.
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
    """Write the part of the prompt "cqm_a" (LLaVA-1.5, lmms-eval) that follows the image or, without one, `HEAD`."""
    hint = f"Context: {question.hint}\n" if question.hint else ""
    options = "\n".join(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(question.choices))
    return f"{chr(10) if image else ' '}{hint}{question.question}\n{options}\n{INSTRUCTION} ASSISTANT:"


@dataclass
class Row:
    """The row of one question.

    Every sentence of a hint has a telling token: the first digit in it or, without a digit, the last token that also
    occurs in the question or in a choice.

    Attributes:
        ids: token ids; the last two are the answer's letter and the end of the turn.
        asked: position of the last token of the prompt, at which the letter is predicted.
        word: token id of the answer's word: the first token of the right choice that no other choice has; -1 if there
            is none.
        ends: position of the last token of each option.
        answer: index of the right option.
        support: positions of the tokens that are the evidence for the answer: the telling tokens of the sentences that
            contain `word`. If some of these sentences share a token with the question that no other sentence has, only
            they count. If no sentence contains `word`, it is the sentence whose such token comes last in the question.
            Without any such sentence, the evidence is the end of the right option. `OnImages.item` replaces all this
            by the tokens of the question that name something in the image.
        told: for each sentence of a hint with several sentences, the positions of its telling token and of the first
            token in which it differs from the other sentences, which is what the sentence is about. Sentences in which
            the telling token does not come later are left out.
        question: positions of the question, without hint and options.
        named: for each token of the question that names something in the image, its position and [n] bool, the patches
            that it names. Empty until `OnImages.item` sets it.
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
    """A tokenizer, and the code that turns questions into rows with it."""

    def __init__(self, bpe: Tokenizer) -> None:
        self.bpe = bpe
        self.head = self.ids(HEAD)
        self.image_head = self.ids(f"{HEAD} ")

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without added special tokens."""
        return self.bpe.encode(text, add_special_tokens=False).ids

    def key(self, question: Question) -> int:
        """The first token of the right choice that no other choice has; -1 if there is none."""
        spelled = [self.ids(f" {choice}") for choice in question.choices]
        others = {t for i, choice in enumerate(spelled) if i != question.answer for t in choice}
        return next((t for t in spelled[question.answer] if t not in others), -1)

    def row(self, question: Question, image: bool) -> Row:
        """Write the row of a question. It starts with `HEAD` if there is no image, else with what follows the image."""
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
        """Find `Row.support` (except for the end of the right option) and `Row.told` of a question.

        Args:
            ids: token ids of the text.
            stops: end of each token in the text, in characters.
            text: text of the prompt.
            question: the question.
        """
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
            # A sentence is about the word in which it begins to differ from the other sentences.
            subject = next((i for i, token in enumerate(mine) if all(token not in o[i : i + 1] for o in others)), 0)
            if others and end > sentence[subject]:
                told.append((end, sentence[subject]))
        found = both or right or [end for at, end in latest if 0 <= at == max(latest)[0]]
        return found, told


@dataclass
class DrillRows:
    """Drills of one batch, as rows that are padded on the right.

    Attributes:
        ids: [R, L] token ids.
        row: [Q] row of each answer.
        at: [Q] position of the last token of the word that is asked, after which the answer comes.
        answer: [Q] token id of the answer.
        evidence: [Q] position of the last word of the fact that tells the answer.
        option: [Q] bool, whether the answer is the letter of an option.
        told: [F, 3] row of each fact that pairs two words, and the positions of its last and its first word.
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
    """Rows of questions, padded on the right.

    Attributes:
        ids: [R, L] token ids.
        lengths: [R] lengths without padding.
        image: [R] index of the image that a row continues; -1 for a text-only row.
        asked: [R] position at which the letter is predicted.
        letter: [R] token id of the letter.
        word: [R] token id of the answer's word; -1 if there is none.
        ends: [R, 5] positions of the options' last tokens; -1 if there is no such option.
        answer: [R] index of the right option.
        support: [R, L] bool, the tokens that are the evidence for the answer.
        patches: [R, n] bool, the patches that are the evidence for the answer.
        naming: [M, 2] row and position of each token that names something shown.
        seen: [M, n] bool, the patches that it names.
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
    """Turn drills into rows: first the facts, then words and their answers in turn."""
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
    """Put rows into one padded chunk.

    Args:
        rows: the rows.
        images: for each row, the index of the image that it continues; -1 for a text-only row.
        patches: for each row, [n] bool, the patches that are the evidence for the answer.
    """
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
