"""The decoder's two stages: on text alone, and joined to the trained vision tower."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qapbench.tasks.diagramqa.draw import icons
from qapbench.tasks.diagramqa.generate import sample
from qapbench.tasks.diagramqa.scene import Question, Scene

from .curriculum import EASY, HARD, drill, lookup
from .decoder import LOOK, WEIGHTS, Decoder, Hints, Prefix, drill_losses, letters, losses, quiz_losses
from .labels import covered, thing_words
from .model import N_PATCHES, PATCHES_SEEN
from .rows import LETTERS, Chunk, Row, Speller, chunk, drill_rows, quiz_rows
from .vision import pixels_of, see

TEXT_ROWS, DRILLS, IMAGES, QUESTIONS, FACTS = 48, 24, 12, 4, 12
Item = tuple[Row, int, Tensor, str]  # row, its image, the patches it depends on, its family
READING = 0.5  # of the joint stage's time goes mostly to reading words from images
ALONE = 0.03  # of the joint stage's time: the projector alone learns to speak
HINTS = ("look", "pick", "judge", "own")  # they fade out
NOWHERE = torch.zeros(N_PATCHES, dtype=torch.bool)


def answer_words(speller: Speller, seed: int, count: int = 3000) -> list[str]:
    """Every word of one token that can be a choice: drills have to find what questions make the decoder say."""
    choices = {choice for i in range(count) for q in sample(seed, i, "train").questions for choice in q.choices}
    return sorted(word for word in choices | set(icons()) if " " not in word and len(speller.ids(f" {word}")) == 1)


class Language:
    """Trains the decoder on text-only questions and synthetic look-ups."""

    name = "language"

    def __init__(self, llava: Any, speller: Speller, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.llava, self.speller = llava, speller
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.decoder = Decoder(llava, [speller.ids(f" {letter}")[0] for letter in LETTERS])
        self.hints = Hints(llava.config.text_config.hidden_size)
        self.trained: dict[str, nn.Module] = {
            "decoder": llava.model.language_model, "head": llava.lm_head, "hints": self.hints,
        }  # fmt: skip
        self.names = sorted({name for name in icons() if " " not in name} | set("ABCDEFGHKLMPRTXZ"))
        self.answers = answer_words(speller, seed)

    def share(self, count: int) -> int:
        """The part of a count that falls to each of the processes, which share the batch."""
        return -(-count // self.ranks)

    def rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, step, self.rank])

    def text_items(self, rng: np.random.Generator, step: int, count: int) -> list[Item]:
        """Rows without an image: synthetic ones by as much as look-up is not mastered yet, and the benchmark's own."""
        questions: list[Question] = []
        find, look = self.hints.mastery.tolist()
        synthetic, easy = 0.12 + 0.63 * (1 - look), 0.08 + 0.6 * (1 - find)
        first = (step * self.ranks + self.rank) * 4096
        while len(questions) < count:
            if rng.random() < synthetic:
                questions.append(lookup(rng, self.names, easy))
                continue
            scene = sample(self.seed + 1, first + len(questions), "train", modality="text")
            questions.append(scene.questions[int(rng.integers(len(scene.questions)))])
        return [(self.speller.row(question, image=False), -1, NOWHERE, question.family) for question in questions]

    def loss(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        rng = self.rng(step)
        total, logged = self.combined({"t": (self.text_items(rng, step, self.share(TEXT_ROWS)), None)}, progress)
        drilled, more = self.drilled(rng)
        return total + drilled, logged | more

    def drilled(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """Drills, which give way to questions as look-up is mastered: weighted losses, and what to log."""
        count = max(DRILLS // 6, round(DRILLS * (1 - float(self.hints.mastery[1]))))
        found = drill_losses(
            self.decoder, drill_rows([drill(rng, self.answers, self.names) for _ in range(count)], self.speller)
        )
        logged = {}
        for name in ("pick", "look", "word"):
            if f"{name}_hit" in found:
                logged[f"drill_{name}_loss"] = float(found[name].detach() / found[f"{name}_n"])
                logged[f"drill_{name}"] = float(found[f"{name}_hit"] / found[f"{name}_n"])
        if "tell" in found:
            logged["drill_tell_loss"] = float(found["tell"].detach() / found["tell_n"])
        total = torch.stack([WEIGHTS[key] * found[key] / found[f"{key}_n"] for key in WEIGHTS if key in found]).sum()
        return total, logged

    def combined(self, kinds: dict[str, tuple[list[Item], Prefix | None]], progress: float) -> Any:
        """Weighted losses over rows of each kind, in chunks of similar length."""
        sums: dict[str, Any] = defaultdict(float)
        logged = {"find": float(self.hints.mastery[0]), "lookup": float(self.hints.mastery[1])}
        for kind, (items, prefix) in kinds.items():
            mine: dict[str, Any] = defaultdict(float)
            items = sorted(items, key=lambda item: len(item[0].ids))
            for part in _parts(items, 4 if prefix is None else 3):
                found = losses(self.decoder, self.hints, _chunk(part), prefix)
                self._mark(found["hit"], part)
                for key, value in found.items():
                    mine[key] += value.sum()
            mine["n"] = len(items)
            logged[f"{kind}_acc"] = float(mine["hit"]) / len(items)
            logged[f"{kind}_judge"] = float(mine["judge_hit"]) / len(items)
            logged[f"{kind}_word"] = float(mine["word_hit"]) / max(1, int(mine["word_n"]))
            for key in ("look", "pick"):
                logged[f"{kind}_{key}"] = float(mine[key].detach()) / max(1, int(mine.get(f"{key}_n", len(items))))
            for key, value in mine.items():
                sums[key] += value
        total = torch.zeros(())
        for key, weight in WEIGHTS.items():
            if key in sums:
                factor = weight * (fade(progress) if key in HINTS else 1.0)
                mean = sums[key] / max(1, int(sums.get(f"{key}_n", sums["n"])))
                total = total + factor * mean
                logged[key] = float(mean.detach())
        return total, logged

    def _mark(self, hits: Tensor, part: list[Item]) -> None:
        """Take up in the running shares what came of the synthetic rows."""
        for at, family in enumerate((EASY, HARD)):
            mine = torch.tensor([item[3] == family for item in part])
            if mine.any():
                self.hints.mastery[at].lerp_(hits[mine].float().mean(), 0.01 * min(5, int(mine.sum())))

    @torch.no_grad()
    def validate(self, count: int = 300) -> dict[str, Any]:
        """Accuracy on questions of the validation split, by family."""
        items = []
        for i in range(count):
            scene = sample(0, i, "val", modality="text")
            question = scene.questions[0]
            items.append((self.speller.row(question, image=False), -1, NOWHERE, question.family))
        right: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self._score(items, None, right)
        return _summary(right)

    def _score(self, items: list[Item], prefix: Prefix | None, right: dict[str, list[int]]) -> None:
        for part in _parts(sorted(items, key=lambda item: len(item[0].ids)), max(1, len(items) // 64)):
            rows = _chunk(part)
            for guess, row, (*_, family) in zip(letters(self.decoder, rows, prefix), rows.answer, part, strict=True):
                right[family][0] += int(guess == row)
                right[family][1] += 1


class Joint(Language):
    """Trains projector and decoder on image questions, the vision tower being fixed, with text-only ones among them.

    Trained along, in batches of ten images, the tower forgot in minutes which relations it had learnt.
    """

    name = "joint"

    def __init__(self, llava: Any, speller: Speller, seed: int, rank: int = 0, ranks: int = 1) -> None:
        super().__init__(llava, speller, seed, rank, ranks)
        self.projector = llava.model.multi_modal_projector
        self.trained["projector"] = self.projector

    @torch.no_grad()
    def fit_projector(self) -> None:
        """Bring the untrained projector's output to the size of the embeddings of words."""
        scenes = [sample(self.seed + 1, i, "train", modality="image") for i in range(16)]
        patches, _ = see(self.llava, pixels_of(scenes))
        self.projector.linear_1.weight /= patches.std()
        size = self.decoder.core.embed_tokens.weight.std() / self.projector(patches).std()
        self.projector.linear_2.weight *= size

    def prefix_of(self, features: Tensor, depth: int | None = None) -> Prefix:
        """What rows continue: the head of the prompt and [B, N, D] projected patches, in so many blocks."""
        head = self.decoder.embed(torch.tensor(self.speller.image_head)).expand(len(features), -1, -1)
        return self.decoder.prefix(torch.cat([head, features], dim=1), depth)

    def loss(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        rng = self.rng(step)
        first = (step * self.ranks + self.rank) * 64
        # Whole questions cost most and teach reading least: two steps of three do without until it is learnt.
        reading = progress < READING and step % 3 > 0
        images = self.share(IMAGES * (1 + reading))
        scenes = [sample(self.seed + 1, first + i, "train", modality="image") for i in range(images)]
        with torch.no_grad():
            patches, _ = see(self.llava, pixels_of(scenes))
        features = self.projector(patches)
        spoken = self.spoken(features, scenes)
        if progress < ALONE:
            return spoken, {"speak": float(spoken.detach())}
        prefix = self.prefix_of(features, LOOK + 1 if reading else None)
        items: list[Item] = []
        quizzes = []
        for owner, scene in enumerate(scenes):
            order = rng.permutation(len(scene.questions))
            asked = [(q, covered(q.relevant) > PATCHES_SEEN) for q in (scene.questions[i] for i in order)]
            if not reading:
                items += [(self.speller.row(q, image=True), owner, marks, q.family) for q, marks in asked[:QUESTIONS]]
            told = [scene.facts[i] for i in rng.permutation(len(scene.facts))[:FACTS]]
            quizzes.append(([asked[i] for i in rng.permutation(len(asked))], told))
        quiz = quiz_losses(self.decoder, quiz_rows(quizzes, self.speller), prefix)
        read = quiz["said"] + 0.3 * fade(progress) * quiz.get("gaze", 0.0) + 0.2 * spoken
        seen = {key: float(value.detach()) for key, value in {**quiz, "speak": spoken}.items()}
        if reading:
            return read, seen
        text = self.text_items(rng, step, self.share(TEXT_ROWS // 4))
        total, logged = self.combined({"i": (items, prefix), "t": (text, None)}, progress)
        drilled, more = self.drilled(rng)
        return total + 0.3 * drilled + read, logged | more | seen

    def spoken(self, features: Tensor, scenes: list[Scene]) -> Tensor:
        """Patches speak the decoder's language: a thing's patches resemble the words for what is true of it."""
        where, words, weights = [], [], []
        for image, scene in enumerate(scenes):
            for thing in scene.things:
                spelled = thing_words(thing, self.speller)
                for patch in (covered([thing.box]) > PATCHES_SEEN).nonzero().flatten().tolist():
                    where += [image * N_PATCHES + patch] * len(spelled)
                    words += spelled
                    weights += [1 / len(spelled)] * len(spelled)
        flat = features.flatten(0, 1)[torch.tensor(where)]
        each = F.cross_entropy(self.decoder.say(flat), torch.tensor(words), reduction="none")
        weight = torch.tensor(weights)
        return (each * weight).sum() / weight.sum()

    @torch.no_grad()
    def validate(self, count: int = 240) -> dict[str, Any]:
        """Accuracy by family, on images (two questions each) and on text."""
        right: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        scenes = [sample(0, i, "val", modality="image") for i in range(count)]
        for s in range(0, count, 24):
            patches, _ = see(self.llava, pixels_of(scenes[s : s + 24]))
            prefix = self.prefix_of(self.projector(patches))
            items = [
                (self.speller.row(question, image=True), owner, NOWHERE, question.family)
                for owner, scene in enumerate(scenes[s : s + 24])
                for question in scene.questions[:2]
            ]
            self._score(items, prefix, right)
        return _summary(right) | {f"text_{key}": value for key, value in super().validate().items()}


def fade(progress: float) -> float:
    """Weight of hints: none for the end of a budget."""
    return min(1.0, max(0.0, (0.9 - progress) / 0.3))


def _chunk(items: list[Item]) -> Chunk:
    rows, images, patches, _ = zip(*items, strict=True)
    return chunk(rows, images, patches)


def _parts(items: list[Any], count: int) -> list[list[Any]]:
    bounds = np.linspace(0, len(items), count + 1).astype(int)
    return [items[a:b] for a, b in itertools.pairwise(bounds) if b > a]


def _summary(right: dict[str, list[int]]) -> dict[str, Any]:
    hits, n = (sum(v[i] for v in right.values()) for i in (0, 1))
    families = {key: round(v[0] / v[1], 3) for key, v in sorted(right.items())}
    return {"val": round(hits / n, 4), "val_n": n, "families": families}
