"""The stages that train the decoder on images.

In `Reading`, patches are shown as symbols, for which no vision tower is needed. In `Joint`, they come from the trained
vision tower.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from qapbench.tasks.diagramqa.generate import image_families, sample
from qapbench.tasks.diagramqa.scene import Question, Scene

from .decoder import LOOK, Prefix, quiz_losses
from .labels import Labeller
from .language import NOWHERE, TEXT_ROWS, Item, Language, fade, summary
from .model import N_PATCHES
from .reading import Shown, Symbols, named, quiz_rows, show, text_quiz
from .rows import Speller
from .vision import pixels_of, see

IMAGES, QUESTIONS = 12, 4  # images in a step with whole questions, and such questions per image
QUIZZED, FACTS, SOME = 24, 4, 24  # images in a step with quizzes alone, sentences per image, and patches shown of each
WORDED = 192  # text-only questions that are asked as quizzes in every step


class OnImages(Language):
    """A stage that trains the decoder on images. A subclass defines what the decoder is shown of a patch.

    Two of three steps have only quizzes, on a few patches of many images. They cost half of what whole questions cost
    and have many more answers. Every third step also has whole questions, on all patches, together with text-only
    questions and drills.
    """

    def patches(self, scenes: list[Scene], chosen: Tensor) -> Tensor:
        """Features of the patches with indices `chosen` [B, n]: [B, n, D]."""
        raise NotImplementedError

    def prefix_of(self, features: Tensor, chosen: Tensor, depth: int | None = None) -> Prefix:
        """Compute the prefix that rows continue: the start of the prompt and the patches, at their own positions.

        Args:
            features: [B, n, D] features of the patches.
            chosen: [B, n] indices of the patches.
            depth: number of blocks to run; None for all.
        """
        ids = torch.tensor(self.speller.image_head)
        head, front = self.decoder.embed(ids).expand(len(features), -1, -1), torch.arange(len(ids))
        positions = torch.cat([front.expand(len(features), -1), chosen + len(ids)], dim=1)
        return self.decoder.prefix(torch.cat([head, features], dim=1), depth, positions, len(ids) + N_PATCHES)

    def item(self, shown: Shown, owner: int, question: Question) -> Item:
        """Turn a question on an image into a row, with the patches that its words name as the evidence.

        Args:
            shown: the scene, and which patches of it are shown.
            owner: index of the image in the batch.
            question: the question.
        """
        row = self.speller.row(question, image=True)
        row.named = named(row.ids[: row.question.stop], shown.values, row.question.start)
        row.support = [at for at, _ in row.named]
        marks = shown.marks(question)
        return row, owner, marks & (not row.named), question.family

    def loss(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Loss of the batch of a step, and values to log; see `Stage.loss`."""
        rng = self.rng(step)
        first = (step * self.ranks + self.rank) * 64
        whole = step % 3 == 0
        scenes = [
            sample(self.seed + 1, first + i, "train", family=self.hints.draw(image_families(), rng))
            for i in range(self.share(IMAGES if whole else QUIZZED))
        ]
        shown = [show(scene, self.speller, rng, N_PATCHES if whole else SOME) for scene in scenes]
        chosen = torch.stack([one.patches for one in shown])
        features = self.patches(scenes, chosen)
        prefix = self.prefix_of(features, chosen, None if whole else LOOK + 1)
        asked = [[scene.questions[i] for i in rng.permutation(len(scene.questions))] for scene in scenes]
        told = [[scene.facts[i] for i in rng.permutation(len(scene.facts))[:FACTS]] for scene in scenes]
        quiz = quiz_rows(list(zip(shown, asked, told, strict=True)), self.speller)
        found, hits = quiz_losses(self.decoder, quiz, prefix)
        self.hints.mark(hits[quiz.asked], quiz.family)
        words = text_quiz(self.text_questions(rng, step, self.share(WORDED), 0.0), self.speller)
        worded, known = quiz_losses(self.decoder, words, None)
        self.hints.mark(known, words.family)
        looked = found.get("look", 0.0) + worded["look"] + worded.get("tell", 0.0)
        hinted = 0.3 * found.get("read", 0.0) + 0.2 * looked
        placed, order = self.ordered(rng)
        total = found["said"] + worded["said"] + placed + fade(progress) * hinted
        logged = {f"quiz_{key}": float(value.detach()) for key, value in found.items()}
        logged |= {f"worded_{key}": float(value.detach()) for key, value in worded.items()}
        logged |= order
        logged["worded_acc"] = float(known.float().mean())
        for key, which in (("quiz_acc", quiz.asked), ("fact_acc", ~quiz.asked)):
            logged[key] = float(hits[which].float().mean())
        if not whole:
            return total, logged
        items = [
            self.item(one, owner, question)
            for owner, (one, questions) in enumerate(zip(shown, asked, strict=True))
            for question in questions[:QUESTIONS]
        ]
        text = self.text_items(rng, step, self.share(TEXT_ROWS // 3))
        rest, more = self.combined({"i": (items, prefix), "t": (text, None)}, progress)
        drilled, drills = self.drilled(rng)
        return total + rest + 0.3 * drilled, logged | more | drills

    @torch.no_grad()
    def validate(self, count: int = 240) -> dict[str, Any]:
        """Accuracy by family on the validation split: with images, two questions about each, and text-only."""
        right: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        scenes = [sample(0, i, "val", modality="image") for i in range(count)]
        everything = torch.arange(N_PATCHES).expand(24, -1)
        for s in range(0, count, 24):
            prefix = self.prefix_of(self.patches(scenes[s : s + 24], everything), everything)
            items = [
                (self.speller.row(question, image=True), owner, NOWHERE, question.family)
                for owner, scene in enumerate(scenes[s : s + 24])
                for question in scene.questions[:2]
            ]
            self.score(items, prefix, right)
        return summary(right) | {f"text_{key}": value for key, value in super().validate().items()}


class Reading(OnImages):
    """The stage that trains the decoder on patches that are shown as symbols. The symbols are trained, too."""

    name = "reading"

    def __init__(
        self, llava: Any, speller: Speller, labeller: Labeller, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        super().__init__(llava, speller, seed, rank, ranks)
        self.labeller = labeller
        self.symbols = Symbols(labeller, speller, llava.get_input_embeddings().weight.detach(), seed)
        self.trained["symbols"] = self.symbols

    def patches(self, scenes: list[Scene], chosen: Tensor) -> Tensor:
        return self.symbols(self.labeller.all_patches(scenes)[torch.arange(len(scenes))[:, None], chosen])


class Joint(OnImages):
    """The stage that trains the projector and the decoder on the patches of the vision tower.

    The vision tower stays fixed. When it was trained as well, in batches of ten images, it forgot within minutes the
    relations between things that it had learnt to recognise.
    """

    name = "joint"

    def __init__(self, llava: Any, speller: Speller, seed: int, rank: int = 0, ranks: int = 1) -> None:
        super().__init__(llava, speller, seed, rank, ranks)
        self.projector: nn.Module = llava.model.multi_modal_projector
        self.trained["projector"] = self.projector

    def patches(self, scenes: list[Scene], chosen: Tensor) -> Tensor:
        with torch.no_grad():
            seen, _ = see(self.llava, pixels_of(scenes))
        return self.projector(seen[torch.arange(len(scenes))[:, None], chosen])
