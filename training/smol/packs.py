"""Questions as packed rows: one image in front, its questions behind it side by side, each as if it were alone.

A pack is a fixed number of tokens. Segment 0 is what the others share: the head of the chat and the image. Every other
segment is the rest of one chat, sees segment 0 and itself, and counts its positions on from segment 0, so that what the
model computes for it is what it computes for the single-question prompt of the benchmark (a test compares the two).
Text-only packs have no segment 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qapbench.checkpoints.assembly import IMAGE
from qapbench.tasks.diagramqa.generate import sample
from qapbench.tasks.diagramqa.scene import Question, Scene
from qapbench.tasks.multichoice import PROMPTS
from training.labels import Labeller
from training.rows import LETTERS

LENGTH = 640
QUESTIONS = 6
LETTER, END, WORDS = 1, 2, 3
"""Kinds of targets: an option's letter, the end of a letter's turn, and the tokens of free answers and captions."""
DESCRIBE = ("Describe the picture.", "What does the picture show?", "List what is true of the picture.")
IN_WORDS = "Answer with a word or a short phrase."
CAPTION = 96  # tokens at most
PAD = -1  # segment of padding


@dataclass(frozen=True)
class Mix:
    """What packs hold.

    Attributes:
        text: every how manieth pack is text-only.
        words: share of the image questions that are also asked without options.
    """

    text: int = 4
    words: float = 0.4


class Wording:
    """The benchmark's wording through the language model's own tokenizer and chat template.

    Args:
        tokenizer: with the token `<image>`; template: the processor's chat template.
        tokens: visual tokens of an image.
    """

    def __init__(self, tokenizer: Any, template: str, tokens: int) -> None:
        self.tokenizer, self.template, self.tokens = tokenizer, template, tokens
        self.image = tokenizer.convert_tokens_to_ids(IMAGE)
        self.end: int = tokenizer.eos_token_id
        self.letters = [self.ids(letter)[0] for letter in LETTERS]
        probe = self.chat("x", image=True)
        self.head = probe[: len(probe) - probe[::-1].index(self.image)]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def chat(self, text: str, image: bool) -> list[int]:
        """Ids of one user turn up to where the answer starts."""
        content = [{"type": "image"}] * image + [{"type": "text", "text": text}]
        chat = [{"role": "user", "content": content}]
        whole = self.tokenizer.apply_chat_template(
            chat, chat_template=self.template, add_generation_prompt=True, tokenize=False
        )
        return self.ids(whole.replace(IMAGE, IMAGE * self.tokens))

    def letter(self, question: Question, image: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """(ids of the benchmark's prompt, its targets as (token, kind))."""
        form = PROMPTS["cqm_a"]
        prompt = self.chat(f"{form.body(vars(question))}{form.instruction}", image)
        return prompt, [(self.letters[question.answer], LETTER), (self.end, END)]

    def words(self, question: Question, image: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """The question without its options, answered in words."""
        hint = f"Context: {question.hint}\n" if question.hint else ""
        return self.free(f"{hint}{question.question}\n{IN_WORDS}", question.choices[question.answer], image)

    def caption(self, scene: Scene, rng: np.random.Generator) -> tuple[list[int], list[tuple[int, int]]]:
        """What is true of a picture, in any order."""
        facts = " ".join(scene.facts[i] for i in rng.permutation(len(scene.facts)))
        return self.free(DESCRIBE[int(rng.integers(len(DESCRIBE)))], facts, True)

    def free(self, asked: str, answer: str, image: bool) -> tuple[list[int], list[tuple[int, int]]]:
        targets = [*self.ids(answer)[:CAPTION], self.end]
        return self.chat(asked, image), [(token, WORDS) for token in targets]


class Pack:
    """One row that is being filled."""

    def __init__(self, head: list[int]) -> None:
        self.ids = list(head)
        self.segment = [0] * len(head)
        self.position = list(range(len(head)))
        self.target = [0] * len(head)
        self.kind = [0] * len(head)
        self.shared, self.segments = len(head), 0

    def add(self, prompt: list[int], targets: list[tuple[int, int]]) -> bool:
        """Add a chat behind the shared head, where there is room for it."""
        ids = prompt[self.shared :] + [token for token, _ in targets[:-1]]
        if len(self.ids) + len(ids) > LENGTH:
            return False
        self.segments += 1
        self.ids += ids
        self.segment += [self.segments] * len(ids)
        self.position += range(self.shared, self.shared + len(ids))
        quiet = len(ids) - len(targets)
        self.target += [0] * quiet + [token for token, _ in targets]
        self.kind += [0] * quiet + [kind for _, kind in targets]
        return True

    def tensors(self, pad: int) -> dict[str, Tensor]:
        """ids, segment, position, target, kind: [LENGTH] each."""
        rest = LENGTH - len(self.ids)
        rows = {
            "ids": (self.ids, pad),
            "segment": (self.segment, PAD),
            "position": (self.position, 0),
            "target": (self.target, 0),
            "kind": (self.kind, 0),
        }
        return {name: torch.tensor(row + [filler] * rest) for name, (row, filler) in rows.items()}


class Packs(Dataset[dict[str, Any]]):
    """Pack `index` of a split; nothing but the arguments decides what is in it."""

    def __init__(self, wording: Wording, labeller: Labeller, seed: int, split: str = "train", mix: Mix | None = None):
        self.wording, self.labeller, self.seed, self.split = wording, labeller, seed, split
        self.mix = mix or Mix()

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, index])
        return self.text(index, rng) if index % self.mix.text == self.mix.text - 1 else self.image(index, rng)

    def image(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """An image with as many of its questions as there is room for; with pixels [H, W, 3] and labels [N, slots]."""
        scene = sample(self.seed, index, self.split, modality="image")
        pack, wording = Pack(self.wording.head), self.wording
        if self.split == "train":
            pack.add(*wording.caption(scene, rng))
        for i in rng.permutation(len(scene.questions))[:QUESTIONS]:
            pack.add(*wording.letter(scene.questions[i], True))
            if self.split == "train" and rng.random() < self.mix.words:
                pack.add(*wording.words(scene.questions[i], True))
        pixels = torch.from_numpy(np.array(scene.image, dtype=np.uint8))
        return {**pack.tensors(wording.end), "pixels": pixels, "labels": self.labeller.patches(scene)}

    def text(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Text-only questions until the row is full."""
        pack = Pack([])
        for at in range(64):
            scene = sample(self.seed, index * 64 + at, self.split, modality="text")
            question = scene.questions[int(rng.integers(len(scene.questions)))]
            if not pack.add(*self.wording.letter(question, False)):
                break
        return pack.tensors(self.wording.end)


def collate(packs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """[B, LENGTH] rows; pixels and labels of the packs that have an image, in their order."""
    rows = ("ids", "segment", "position", "target", "kind")
    batch = {name: torch.stack([pack[name] for pack in packs]) for name in rows}
    seen = [pack for pack in packs if "pixels" in pack]
    return batch | ({name: torch.stack([p[name] for p in seen]) for name in ("pixels", "labels")} if seen else {})


def visible(segment: Tensor) -> Tensor:
    """[B, 1, L, L] which token sees which."""
    asks, told = segment[:, :, None], segment[:, None, :]
    order = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool, device=segment.device).tril()
    alone = torch.eye(segment.shape[1], dtype=torch.bool, device=segment.device)
    return ((order & ((told == 0) | (told == asks)) & (told != PAD)) | alone)[:, None]


class Feed:
    """Batches in order, drawn ahead by worker processes.

    Args:
        data: anything indexed by number; batch s holds its items s * size ... (s + 1) * size - 1.
        workers: processes; none draws in this one.
    """

    def __init__(self, data: Dataset[Any], size: int, workers: int, join: Any = collate, pin: bool = False) -> None:
        self.data, self.size, self.workers, self.join, self.pin = data, size, workers, join, pin
        self.next, self.batches = -1, iter(())

    def at(self, step: int) -> Any:
        """The batch of a step; cheap when steps are asked for one after another."""
        if step != self.next:
            self.next, self.batches = step, self._from(step)
        self.next += 1
        return next(self.batches)

    def _from(self, step: int) -> Iterator[Any]:
        indices: Any = range(step * self.size, 2**40)
        ahead: dict[str, Any] = {"prefetch_factor": 8, "multiprocessing_context": "spawn"} if self.workers else {}
        return iter(
            DataLoader(
                self.data,
                self.size,
                sampler=indices,
                num_workers=self.workers,
                collate_fn=self.join,
                pin_memory=self.pin,
                drop_last=True,
                **ahead,
            )
        )
