"""Reading from images: which patches the decoder is shown, which words name them, and quizzes about them."""

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

ASKED = 4  # number of text-only questions per row

Values = dict[tuple[int, ...], Tensor]
"""For words, as token ids, [n] bool: the patches of the things that the words are true of."""


def spelled(value: str, speller: Speller) -> tuple[int, ...]:
    """Token ids of a slot's value as it occurs in a text: "letter A" is written as "A"."""
    return tuple(speller.ids(f" {value.split()[-1] if value.startswith(('letter ', 'number ')) else value}"))


class Symbols(nn.Module):
    """What a perfect vision tower would show of a patch: the sum of one vector per value that is true of it.

    A vector is initialised with the embedding of the value's words, so that a word in a question resembles what it
    names. The vectors of related things are rotated, by one rotation per relation, because otherwise a related thing
    could not be distinguished from the thing itself.

    Args:
        labeller: defines the slots and their values.
        speller: the tokenizer.
        words: [V, D] embeddings of tokens.
        seed: seed of the rotations and of the noise that is added to the embeddings.
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
        """Turn labels [..., slots] into symbols [..., D]. A label of -1 adds nothing."""
        return self.aux_symbols(torch.where(labels >= 0, labels + self.starts, self.nothing)).sum(-2)


@dataclass
class Shown:
    """A scene, and the part of it that the decoder is shown.

    Attributes:
        scene: the scene.
        patches: [n] indices of the patches that are shown, in ascending order.
        values: the words that name some of them.
    """

    scene: Scene
    patches: Tensor
    values: Values

    def marks(self, question: Question) -> Tensor:
        """[n] bool, the shown patches that the answer to a question depends on."""
        return (covered(question.relevant) > PATCHES_SEEN)[self.patches]


def show(scene: Scene, speller: Speller, rng: np.random.Generator, count: int) -> Shown:
    """Choose `count` patches of a scene: two of each thing, as far as `count` allows, and others at random."""
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
    """Find the words in a text that name something shown.

    Args:
        ids: token ids of the text.
        values: the words that name something.
        start: first position to search.

    Returns:
        For each word found, the position of its last token, and [n] bool: the patches that it names. If several words
        end in the same position, the longest one counts.
    """
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
    """Quizzes of one batch, as rows that are padded on the right.

    From `quiz_rows`, a row holds questions about one image without options, followed by sentences about it. From
    `text_quiz`, a row holds several text-only questions with options.

    Attributes:
        ids: [R, L] token ids.
        row: [Q] row of each word to be predicted.
        at: [Q] position after which the word comes.
        word: [Q] token id of the word.
        asked: [Q] bool, whether the word is the answer to a question, and not the last word of a sentence.
        family: the family of each question, in order.
        patches: [Q, n] bool, the patches that are the evidence for the word: those that the answer depends on, if the
            question names nothing that is shown; otherwise none.
        support: [Q, L] bool, the tokens that are the evidence for the word: those that name something shown or, in a
            text-only question, those of `Row.support`.
        naming: [M, 2] row and position of each token that names something shown.
        seen: [M, n] bool, the patches that it names.
        told: [F, 3] row of each sentence of a hint, and the positions of its telling token and of what it is about, as
            in `Row.told`; empty in rows about images.
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
    """Write one row per image.

    Args:
        quizzes: for each image, what is shown of it, questions about it, and sentences that are true of it. Questions
            whose answer has no token of its own (`Speller.key`) are left out.
        speller: the tokenizer.
    """
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
    """Write ASKED text-only questions per row, with options but without the instruction; answers are words."""
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
