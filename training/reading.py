"""What the decoder has to read from an image: which patches it is shown, which words name them, and quizzes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qapbench.tasks.diagramqa.scene import Question, Scene

from .labels import RELATIONS, Labeller, covered
from .model import N_PATCHES, PATCHES_SEEN
from .rows import Speller

ASKED = 4  # text-only questions in a row

Values = dict[tuple[int, ...], Tensor]
"""Words, as token ids, and the patches [n] of the things that they are true of."""


def spelled(value: str, speller: Speller) -> tuple[int, ...]:
    """The words of a slot's value, as a text would have them: "letter A" is written A."""
    return tuple(speller.ids(f" {value.split()[-1] if value.startswith(('letter ', 'number ')) else value}"))


class Symbols(nn.Module):
    """What a faultless tower would show of a patch: the sum of a vector for each thing that is true of it.

    A vector starts as the embedding of the value's words, so that a word in a question resembles what it names;
    related things are turned by a rotation a relation, or they could not be told from the thing itself.
    """

    def __init__(self, labeller: Labeller, speller: Speller, words: Tensor, seed: int) -> None:
        super().__init__()
        self.starts = torch.tensor([0, *labeller.sizes[:-1]]).cumsum(0)
        self.nothing = sum(labeller.sizes)
        self.aux_symbols = nn.Embedding(self.nothing + 1, words.shape[1], padding_idx=self.nothing)
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            table = self.aux_symbols.weight.normal_(0, 0.02, generator=rng)
            for start, (slot, values) in zip(self.starts.tolist(), labeller.slots.items(), strict=True):
                turn = torch.randn(words.shape[1], words.shape[1], generator=rng)
                turn = torch.linalg.qr(turn)[0] if slot in RELATIONS else torch.eye(words.shape[1])
                for i, value in enumerate(values):
                    if value:
                        table[start + i] += turn @ words[list(spelled(value, speller))].sum(0)
            table[self.nothing] = 0

    def forward(self, labels: Tensor) -> Tensor:
        """[..., slots] labels (-1: nothing to say) -> [..., D]."""
        return self.aux_symbols(torch.where(labels >= 0, labels + self.starts, self.nothing)).sum(-2)


@dataclass
class Shown:
    """A scene, and what of it the decoder is shown: patches [n], ascending, and the words that name some of them."""

    scene: Scene
    patches: Tensor
    values: Values

    def marks(self, question: Question) -> Tensor:
        """[n] those that the answer depends on."""
        return (covered(question.relevant) > PATCHES_SEEN)[self.patches]


def show(scene: Scene, speller: Speller, rng: np.random.Generator, count: int) -> Shown:
    """At least two patches of each thing (as far as `count` goes), and others at random."""
    things = [(thing, covered([thing.box]) > PATCHES_SEEN) for thing in scene.things]
    first: dict[int, None] = {}
    for _, there in things:
        first |= dict.fromkeys(rng.permutation(there.nonzero().flatten().numpy())[:2].tolist())
    first |= dict.fromkeys(rng.permutation(N_PATCHES).tolist())
    patches = torch.tensor(sorted(list(first)[:count]))
    values: Values = {}
    for thing, there in things:
        named = {} if thing.name.split()[-1] in ("bar", "state") else {"name": thing.name}
        for slot, value in {**named, **thing.about}.items():
            if slot not in RELATIONS:
                words = spelled(value, speller)
                values[words] = values.get(words, torch.zeros(count, dtype=torch.bool)) | there[patches]
    return Shown(scene, patches, {words: marks for words, marks in values.items() if marks.any()})


def named(ids: Sequence[int], values: Values, start: int = 0) -> list[tuple[int, Tensor]]:
    """Where token ids name what is shown (the last token of the longest match), and the patches that they name."""
    ending: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for words in values:
        ending[words[-1]].append(words)
    found = []
    for at in range(start, len(ids)):
        matches = [words for words in ending.get(ids[at], ()) if tuple(ids[at + 1 - len(words) : at + 1]) == words]
        if matches:
            found.append((at, values[max(matches, key=len)]))
    return found


@dataclass
class QuizRows:
    """What is to be read from images, one row each, padded on the right: questions without options, then sentences.

    Attributes:
        ids: [R, L], a row an image.
        row, at: [Q] where a word is due; word: [Q] the token that has to come next.
        family: of each question, in order; the sentences follow it.
        patches, support: [Q, n] and [Q, L] bool, where to look for the word: at what the question names, or, if
            it names nothing that is shown, at the patches that its answer depends on.
        naming, seen: [M, 2] row and position of every word that names something, and [M, n] what it names.
        told: [F, 3] row of each sentence of a hint, and where it ends and what it is about; in rows without an image.
    """

    ids: Tensor
    row: Tensor
    at: Tensor
    word: Tensor
    asked: Tensor
    family: list[str]
    patches: Tensor
    support: Tensor
    naming: Tensor
    seen: Tensor
    told: Tensor


def quiz_rows(quizzes: Sequence[tuple[Shown, Sequence[Question], Sequence[str]]], speller: Speller) -> QuizRows:
    """For each image, some of its questions and some true sentences."""
    rows, due, patches, naming, seen, family = [], [], [], [], [], []
    turn = speller.ids(" ASSISTANT:")
    for r, (shown, questions, sentences) in enumerate(quizzes):
        ids: list[int] = []
        for question in questions:
            word = speller.key(question)
            if word >= 0:
                start = len(ids)
                ids += speller.ids(f"\n{question.question}") + turn
                due.append((r, start, len(ids) - 1, word, True))
                patches.append(shown.marks(question))
                family.append(question.family)
                ids.append(word)
        ids += speller.ids("\n")
        for sentence in sentences:
            start, told = len(ids), speller.ids(f" {sentence.removesuffix('.')}")
            due.append((r, start, start + len(told) - 2, told[-1], False))
            patches.append(torch.zeros_like(shown.patches, dtype=torch.bool))
            ids += [*told, *speller.ids(".")]
        for at, there in named(ids, shown.values):
            naming.append((r, at))
            seen.append(there)
        rows.append(torch.tensor(ids))
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    row, begin, end, words, asked = (torch.tensor(column) for column in zip(*due, strict=True))
    places, where = torch.tensor(naming).view(-1, 2), torch.arange(padded.shape[1])[None]
    names = torch.zeros(padded.shape, dtype=torch.bool)
    names[places[:, 0], places[:, 1]] = True
    support = names[row] & (where >= begin[:, None]) & (where <= end[:, None])
    needed = torch.stack(patches) & ~support.any(1, keepdim=True)
    nothing = torch.zeros(0, 3, dtype=torch.long)
    return QuizRows(padded, row, end, words, asked, family, needed, support, places, torch.stack(seen), nothing)


def text_quiz(questions: Sequence[Question], speller: Speller) -> QuizRows:
    """Text-only questions with their options, several a row, without the instruction: what is due is the word."""
    rows, family, support = list[Tensor](), list[str](), list[tuple[int, list[int]]]()
    due, told = list[tuple[int, int, int]](), list[tuple[int, int, int]]()
    for r in range(0, len(questions), ASKED):
        ids = list(speller.head)
        for question in questions[r : r + ASKED]:
            row = speller.row(question, image=True)
            if row.word >= 0:
                support.append((len(due), [at + len(ids) for at in row.support]))
                told += [(len(rows), len(ids) + end, len(ids) + subject) for end, subject in row.told]
                ids += [*row.ids[: row.ends[-1] + 1], *speller.ids("\nASSISTANT:")]
                due.append((len(rows), len(ids) - 1, row.word))
                family.append(question.family)
                ids.append(row.word)
        rows.append(torch.tensor(ids))
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    row_of, at, words = torch.tensor(due).view(-1, 3).unbind(1)
    nothing = torch.zeros(len(due), 0, dtype=torch.bool)
    where = torch.zeros(len(due), padded.shape[1], dtype=torch.bool)
    for index, places in support:
        where[index, places] = True
    every = torch.ones(len(due), dtype=torch.bool)
    nobody = row_of.new_zeros(0, 2)
    sentences = torch.tensor(told, dtype=torch.long).view(-1, 3)
    return QuizRows(padded, row_of, at, words, every, family, nothing, where, nobody, nothing[:0], sentences)
