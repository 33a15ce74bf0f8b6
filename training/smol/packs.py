"""Packs: rows of tokens with one image, followed by several independent chats about it.

A pack has a fixed number of tokens. Its segment 0 is shared by all chats: the start of a chat, and the image. Every
other segment is the rest of one chat. It attends only to segment 0 and to itself, and its positions continue those of
segment 0. The model therefore computes the same for it as for the benchmark's prompt with this question alone, which a
test checks. Text-only packs have no segment 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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

LENGTH = 640  # tokens of a pack
QUESTIONS = 6  # largest number of questions about an image
LETTER, END, WORDS = 1, 2, 3
"""Kinds of targets: the letter of an option, the end of the turn after a letter, and tokens of answers and captions."""
DESCRIBE = ("Describe the picture.", "What does the picture show?", "List what is true of the picture.")
IN_WORDS = "Answer with a word or a short phrase."
CAPTION = 96  # largest number of tokens of a caption or a free answer
PAD = -1  # the segment of padding


@dataclass(frozen=True)
class Mix:
    """The mixture of chats in packs.

    Attributes:
        text: one of so many packs is text-only.
        words: probability that a question about an image is also asked without options.
        drills: probability that a text-only pack consists of drills.
    """

    text: int = 4
    words: float = 0.4
    drills: float = 0.0


class Wording:
    """Writes chats as token ids, with the benchmark's prompts and the language model's tokenizer and chat template.

    Args:
        tokenizer: the tokenizer, which must have the token `<image>`.
        template: chat template of the processor.
        tokens: number of visual tokens of an image.
    """

    def __init__(self, tokenizer: Any, template: str, tokens: int) -> None:
        self.tokenizer, self.template, self.tokens = tokenizer, template, tokens
        self.image = tokenizer.convert_tokens_to_ids(IMAGE)
        self.end: int = tokenizer.eos_token_id
        self.letters = [self.ids(letter)[0] for letter in LETTERS]
        probe = self.chat("x", image=True)
        self.head = probe[: len(probe) - probe[::-1].index(self.image)]

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without added special tokens."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def chat(self, text: str, image: bool) -> list[int]:
        """Token ids of a chat with one user turn, up to where the answer starts."""
        content = [{"type": "image"}] * image + [{"type": "text", "text": text}]
        chat = [{"role": "user", "content": content}]
        whole = self.tokenizer.apply_chat_template(
            chat, chat_template=self.template, add_generation_prompt=True, tokenize=False
        )
        return self.ids(whole.replace(IMAGE, IMAGE * self.tokens))

    def letter(self, question: Question, image: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Write a question with the benchmark's prompt, answered by a letter.

        Returns:
            Token ids of the prompt, and its targets as (token id, kind).
        """
        form = PROMPTS["cqm_a"]
        prompt = self.chat(f"{form.body(vars(question))}{form.instruction}", image)
        return prompt, [(self.letters[question.answer], LETTER), (self.end, END)]

    def words(self, question: Question, image: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Write a question without its options, answered in words. Returns the same as `letter`."""
        hint = f"Context: {question.hint}\n" if question.hint else ""
        return self.free(f"{hint}{question.question}\n{IN_WORDS}", question.choices[question.answer], image)

    def caption(self, scene: Scene, rng: np.random.Generator) -> tuple[list[int], list[tuple[int, int]]]:
        """Write a request to describe an image, answered by its facts in random order. Returns the same as `letter`."""
        facts = " ".join(scene.facts[i] for i in rng.permutation(len(scene.facts)))
        return self.free(DESCRIBE[int(rng.integers(len(DESCRIBE)))], facts, True)

    def free(self, asked: str, answer: str, image: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Write a chat with an answer of several tokens. Returns the same as `letter`."""
        targets = [*self.ids(answer)[:CAPTION], self.end]
        return self.chat(asked, image), [(token, WORDS) for token in targets]


class Pack:
    """A pack that is being filled.

    Args:
        head: token ids of segment 0.
    """

    def __init__(self, head: list[int]) -> None:
        self.ids = list(head)
        self.segment = [0] * len(head)
        self.position = list(range(len(head)))
        self.target = [0] * len(head)
        self.kind = [0] * len(head)
        self.shared, self.segments = len(head), 0

    def add(self, prompt: list[int], targets: list[tuple[int, int]]) -> bool:
        """Add a chat as a new segment, if there is room for it.

        Args:
            prompt: token ids of the prompt, including those of segment 0.
            targets: tokens to predict after the prompt, as (token id, kind).

        Returns:
            Whether there was room.
        """
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
        """The tensors "ids", "segment", "position", "target" and "kind" (0 without a target), each [LENGTH].

        Args:
            pad: token id of padding.
        """
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
    """The packs of a split, by index. Their content depends only on the arguments and the index.

    Args:
        wording: writes chats as token ids.
        labeller: labels the patches of scenes.
        seed: seed of the scenes.
        split: name of the split. Only packs of "train" contain free answers. Their captions stand in front of the
            questions, those of other splits behind them.
        mix: the mixture of chats; None for the default.
    """

    def __init__(self, wording: Wording, labeller: Labeller, seed: int, split: str = "train", mix: Mix | None = None):
        self.wording, self.labeller, self.seed, self.split = wording, labeller, seed, split
        self.mix = mix or Mix()

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, index])
        return self.text(index, rng) if index % self.mix.text == self.mix.text - 1 else self.image(index, rng)

    def image(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Draw a pack with an image and up to QUESTIONS questions about it, as far as there is room.

        In addition to the tensors of every pack, it has "pixels" [H, W, 3] and "labels" [N, slots].
        """
        scene = sample(self.seed, index, self.split, modality="image")
        pack, wording = Pack(self.wording.head), self.wording
        if self.split == "train":
            pack.add(*wording.caption(scene, rng))
        for i in rng.permutation(len(scene.questions))[:QUESTIONS]:
            pack.add(*wording.letter(scene.questions[i], True))
            if self.split == "train" and rng.random() < self.mix.words:
                pack.add(*wording.words(scene.questions[i], True))
        if self.split != "train":
            pack.add(*wording.caption(scene, rng))
        pixels = torch.from_numpy(np.array(scene.image, dtype=np.uint8))
        return {**pack.tensors(wording.end), "pixels": pixels, "labels": self.labeller.patches(scene)}

    def text(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Draw a pack of text-only questions, or of drills in their place, until there is no more room.

        A drill asks for the letter of an option that is named, which is the last step of every question.
        """
        # Without drills nothing is drawn for them: the questions are those of before there were any.
        drills = self.split == "train" and self.mix.drills > 0 and rng.random() < self.mix.drills
        pack = Pack([])
        for at in range(64):
            scene = sample(self.seed, index * 64 + at, self.split, modality="text")
            question = scene.questions[int(rng.integers(len(scene.questions)))]
            if drills:
                question = replace(question, question=f"Find: {question.choices[question.answer]}", hint="")
            if not pack.add(*self.wording.letter(question, False)):
                break
        return pack.tensors(self.wording.end)


def collate(packs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Put packs into one batch: [B, LENGTH] each, and [I, ...] for pixels and labels of the I packs with an image."""
    rows = ("ids", "segment", "position", "target", "kind")
    batch = {name: torch.stack([pack[name] for pack in packs]) for name in rows}
    seen = [pack for pack in packs if "pixels" in pack]
    return batch | ({name: torch.stack([p[name] for p in seen]) for name in ("pixels", "labels")} if seen else {})


def visible(segment: Tensor) -> Tensor:
    """Make the attention mask from the segments [B, L]: [B, 1, L, L] bool, True where a token attends to another."""
    asks, told = segment[:, :, None], segment[:, None, :]
    order = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool, device=segment.device).tril()
    alone = torch.eye(segment.shape[1], dtype=torch.bool, device=segment.device)
    return ((order & ((told == 0) | (told == asks)) & (told != PAD)) | alone)[:, None]


class Feed:
    """Batches by step, which are drawn ahead by other processes.

    Args:
        data: a data set indexed by number. Batch s consists of the items from s * size to (s + 1) * size - 1.
        size: number of items in a batch.
        workers: number of processes; 0 draws in this process.
        join: function that puts a list of items into one batch.
        pin: whether to put batches into pinned memory.
    """

    def __init__(self, data: Dataset[Any], size: int, workers: int, join: Any = collate, pin: bool = False) -> None:
        self.data, self.size, self.workers, self.join, self.pin = data, size, workers, join, pin
        self.next, self.batches = -1, iter(())

    def at(self, step: int) -> Any:
        """Get the batch of a step. This is fast only if the steps are consecutive."""
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
