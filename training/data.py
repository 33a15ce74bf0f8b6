"""Batches for ``diagram-llava``: a pure function of (seed, step), drawn by the diagramqa generator.

An image is encoded once and shared by many short rows (its questions, a dense caption); the rows continue
the image prefix ``<s>USER: <image>...`` exactly as a single-question prompt does.  Text-only rows start at
``<s>``.  Every token carries a category that decides the weight of its loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qapbench.tasks.diagramqa.generate import sample
from qapbench.tasks.diagramqa.scene import Question, Scene

from .lookup import synthetic
from .model import BOS, CLIP_TEXT_LEN, EOS, GRID, N_PATCHES, PATCH, train_bpe

INSTRUCTION = "Answer with the option's letter from the given choices directly."
WORDS = "Answer with the words of the right choice."
LM, LETTER, WORD, FACT, COPY = 1, 2, 3, 4, 5
HEAD = f"{BOS}USER: "
Row = tuple[list[int], list[int], dict[int, int]]
"""Tokens, loss category of each, and for the last token of each option whether it is right."""


def user_options(q: Question) -> str:
    """The lettered options, one a line."""
    return "\n".join(f"{'ABCDE'[i]}. {c}" for i, c in enumerate(q.choices))


def user_text(q: Question, instruction: str = INSTRUCTION, hint: str | None = None) -> str:
    """The prompt of lmms-eval's LLaVA-1.5 ScienceQA ("cqm_a"), without the image token."""
    hint = q.hint if hint is None else hint
    context = f"Context: {hint}\n" if hint else ""
    return f"{context}{q.question}\n{user_options(q)}\n{instruction}"


def place_facts(scene: Scene) -> list[str]:
    """Where things are, on a 6 x 6 grid: name -> place and place -> name, for every kind of picture."""
    out = []
    for i, thing in enumerate(scene.things):
        x, y = ((thing.box[k] + thing.box[k + 2]) / 2 for k in (0, 1))
        col, row = int(x * 6 / 96), int(y * 6 / 96)
        out.append(f"at {row} {col}: {thing.name}." if i % 2 else f"{thing.name}: {row} {col}.")
    return out


def build_vocabulary(seed: int = 0, n: int = 5000) -> tuple[Tokenizer, list[str]]:
    """The BPE and the names of things (index 0 is background), from the first training scenes."""
    texts: list[str] = []
    names: Counter[str] = Counter()
    for i in range(n):
        scene = sample(seed, i, "train")
        names.update(t.name for t in scene.things)
        texts += scene.facts
        for q in scene.questions:
            texts.append(f"{HEAD}\n{user_text(q)} ASSISTANT: {'ABCDE'[q.answer]}{EOS}")
            texts += [f"ASSISTANT: {c}" for c in ("A", "B", "C", "D", "E")] + q.choices + place_facts(scene)
    return train_bpe(texts), ["", *sorted(names)]


@dataclass
class Mix:
    """What one step consists of."""

    images: int
    questions: int
    captions: float
    texts: int
    contexts: int
    synthetic: int

    def share(self, ranks: int) -> Mix:
        """The part of one of several processes."""
        counts = [self.images, self.texts, self.contexts, self.synthetic]
        images, texts, contexts, synth = (-(-c // ranks) for c in counts)
        return Mix(images, self.questions, self.captions, texts, contexts, synth)


WARMUP = Mix(images=6, questions=1, captions=1.0, texts=2, contexts=4, synthetic=16)
MAIN = Mix(images=12, questions=4, captions=0.5, texts=8, contexts=8, synthetic=4)
WARMUP_STEPS = 120


class Batcher:
    """Turns scenes into tensors."""

    def __init__(self, bpe: Tokenizer, names: list[str], seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.bpe, self.seed, self.rank, self.ranks = bpe, seed, rank, ranks
        self.name_id = {name: i for i, name in enumerate(names)}
        # The word that stands for a thing: its letter or digit, otherwise its first word.
        spoken = [n.split()[-1] if n.startswith(("letter ", "number ")) else n.split(" ")[0] for n in names]
        pieces = [self.ids(f" {n}") for n in spoken]
        self.name_tokens = torch.tensor([[p[0], p[-1]] for p in pieces])
        self.words = [n for n in names[1:] if " " not in n] + list("0123456789")

    def ids(self, text: str) -> list[int]:
        """Token ids without added special tokens."""
        return self.bpe.encode(text, add_special_tokens=False).ids

    def row(self, pieces: list[tuple[str, int]]) -> Row:
        """Tokens and loss categories of a row given as (text, category) pieces."""
        ids: list[int] = []
        cats: list[int] = []
        for text, cat in pieces:
            new = self.ids(text)
            ids += new
            cats += [cat] * len(new)
        return ids, cats, {}

    def question_row(self, q: Question, start: str, words_first: bool, hint: str | None = None) -> Row:
        """A question with the answer as a letter and then in words, or the other way round."""
        letter, word = (f" {'ABCDE'[q.answer]}", LETTER), (f" {q.choices[q.answer]}", WORD)
        first, second = (word, letter) if words_first else (letter, word)
        follow = "Which letter?" if words_first else "In words?"
        text = start + user_text(q, WORDS if words_first else INSTRUCTION, hint)
        ids, cats, _ = self.row(
            [
                (f"{text} ASSISTANT:", LM),
                first,
                (EOS, LM),
                (f"USER: {follow} ASSISTANT:", 0),
                second,
                (EOS, LM),
            ]
        )
        ends = [end for _, end in self.bpe.encode(text, add_special_tokens=False).offsets]
        options: dict[int, int] = {}
        at = text.rindex("\n") - len(user_options(q))
        for i, line in enumerate(user_options(q).split("\n")):
            at += len(line) + (i > 0)
            options[ends.index(at)] = int(i == q.answer)
        return ids, cats, options

    def caption_row(self, scene: Scene, rng: np.random.Generator) -> Row:
        """All that is true of the image, in random order."""
        facts = scene.facts + place_facts(scene)
        order = rng.permutation(len(facts))[:14]
        text = "".join(f" {facts[i]}" for i in order)
        return self.row([("\nDescribe the picture. ASSISTANT:", 0), (text, FACT), (EOS, LM)])

    def patches(self, boxes: list[Any]) -> np.ndarray:
        """Share of each patch that the boxes cover."""
        mask = np.zeros((GRID * PATCH, GRID * PATCH), np.float32)
        for x0, y0, x1, y1 in boxes:
            mask[max(0, y0) : y1, max(0, x0) : x1] = 1
        return mask.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)).reshape(-1)

    def patch_names(self, scene: Scene) -> np.ndarray:
        """Name index per patch; the smallest thing wins."""
        out = np.zeros(N_PATCHES, np.int64)
        for t in sorted(scene.things, key=lambda t: -(t.box[2] - t.box[0]) * (t.box[3] - t.box[1])):
            out[self.patches([t.box]) > 0.4] = self.name_id.get(t.name, 0)
        return out

    def relevance_text(self, q: Question, rng: np.random.Generator) -> str:
        """Question, hint and choices, joined in the ways in which a caller may join them."""
        parts = [q.question, q.hint, *q.choices]
        if rng.random() < 0.2:
            parts = [q.question]
        elif rng.random() < 0.3:
            parts = [q.hint, q.question, *q.choices]
        return (" " if rng.random() < 0.5 else "\n").join(p for p in parts if p)

    def pad(self, rows: list[Row], side_index: list[int], chunks: int) -> list[dict[str, Tensor]]:
        """Right-padded chunks of rows of similar length."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        out = []
        for part in np.array_split(np.array(order), chunks):
            width = max(len(rows[i][0]) for i in part)
            ids = torch.zeros(len(part), width, dtype=torch.long)
            cats = torch.zeros(len(part), width, dtype=torch.long)
            mask = torch.zeros(len(part), width, dtype=torch.long)
            for r, i in enumerate(part):
                n = len(rows[i][0])
                ids[r, :n] = torch.tensor(rows[i][0])
                cats[r, :n] = torch.tensor(rows[i][1])
                mask[r, :n] = 1
            right = torch.full((len(part), width), -1, dtype=torch.long)
            for r, i in enumerate(part):
                for at, value in rows[i][2].items():
                    right[r, at] = value
            index = torch.tensor([side_index[i] for i in part])
            out.append({"ids": ids, "cats": cats, "mask": mask, "image": index, "right": right})
        return out

    def clip_ids(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask for the CLIP text tower, ``</s>`` last."""
        rows = [self.ids(BOS) + self.ids(t)[: CLIP_TEXT_LEN - 2] + self.ids(EOS) for t in texts]
        width = max(map(len, rows))
        ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
        return ids, (ids != 0).long()

    def batch(self, step: int) -> dict[str, Any]:
        """The training batch of a step."""
        rng = np.random.default_rng([self.seed, step, self.rank])
        mix = (WARMUP if step < WARMUP_STEPS else MAIN).share(self.ranks)
        first = (step * self.ranks + self.rank) * 64
        scenes = [sample(self.seed + 1, first + i, "train", modality="image") for i in range(mix.images)]
        rows: list[Row] = []
        owner: list[int] = []
        text_rows: list[Row] = []
        clip_texts, captions, positives, named = [], [], [], []
        for n, scene in enumerate(scenes):
            for i in rng.permutation(len(scene.questions))[: mix.questions]:
                rows.append(self.question_row(scene.questions[i], "\n", bool(rng.random() < 0.25)))
                owner.append(n)
            if rng.random() < mix.captions:
                rows.append(self.caption_row(scene, rng))
                owner.append(n)
            q = scene.questions[int(rng.integers(len(scene.questions)))]
            clip_texts.append(self.relevance_text(q, rng))
            positives.append(self.patches(q.relevant) > 0.3)
            facts = [scene.facts[i] for i in rng.permutation(len(scene.facts))[:5]] or ["a picture"]
            captions.append(" ".join(facts))
            thing = scene.things[int(rng.integers(len(scene.things)))] if scene.things else None
            named.append(thing.name if thing else "")
        for i in range(mix.contexts):
            # The same questions with the facts as text instead of the image: look-up without vision.
            scene = scenes[i % len(scenes)]
            told = " ".join(scene.facts[j] for j in rng.permutation(len(scene.facts))[:16])
            q = scene.questions[int(rng.integers(len(scene.questions)))]
            text_rows.append(self.question_row(q, HEAD, bool(rng.random() < 0.3), told))
        for i in range(mix.texts):
            scene = sample(self.seed + 1, first + i, "train", modality="text")
            if rng.random() < 0.2 and scene.facts:
                text_rows.append(self.row([(HEAD, 0), (" ".join(scene.facts), FACT), (EOS, LM)]))
                continue
            q = scene.questions[int(rng.integers(len(scene.questions)))]
            text_rows.append(self.question_row(q, HEAD, bool(rng.random() < 0.25)))
        for _ in range(mix.synthetic):
            pieces = [(t, COPY if known else 0) for t, known in synthetic(rng, self.words)]
            text_rows.append(self.row([(BOS, 0), *pieces]))
        clip, clip_mask = self.clip_ids(clip_texts + captions + [f"the {n}" for n in named])
        pixels = np.stack([np.asarray(s.image) for s in scenes])
        return {
            "pixels": torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
            "image_rows": self.pad(rows, owner, 3),
            "text_rows": self.pad(text_rows, [0] * len(text_rows), 2),
            "clip_ids": clip,
            "clip_mask": clip_mask,
            "positives": torch.from_numpy(np.stack(positives)),
            "patch_names": torch.from_numpy(np.stack([self.patch_names(s) for s in scenes])),
            "name_tokens": self.name_tokens,
            "named": torch.tensor([self.name_id.get(n, 0) for n in named]),
            "head": torch.tensor(self.ids(HEAD)),
        }


class _Steps(Dataset):
    def __init__(self, batcher: Batcher, start: int) -> None:
        self.batcher, self.start = batcher, start

    def __len__(self) -> int:
        return 10_000_000

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.batcher.batch(self.start + i)


def loader(batcher: Batcher, start: int, workers: int = 1) -> Iterator[dict[str, Any]]:
    """Batches from step ``start`` on, made by worker processes."""
    data = _Steps(batcher, start)
    kwargs: dict[str, Any] = {"prefetch_factor": 4} if workers else {}
    return iter(DataLoader(data, batch_size=None, shuffle=False, num_workers=workers, **kwargs))
