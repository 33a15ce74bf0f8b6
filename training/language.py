"""The stage that trains the decoder on text alone: on questions of the benchmark, synthetic look-ups and drills."""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qapbench.tasks.diagramqa.draw import icons
from qapbench.tasks.diagramqa.families.dictionary import words
from qapbench.tasks.diagramqa.generate import sample, text_families
from qapbench.tasks.diagramqa.scene import Question

from .curriculum import EASY, HARD, drill, lookup
from .decoder import WEIGHTS, Decoder, Hints, Prefix, drill_losses, letters, losses, order_losses
from .model import N_PATCHES
from .rows import LETTERS, Chunk, Row, Speller, chunk, drill_rows

TEXT_ROWS, DRILLS = 48, 24  # questions per step, and the largest number of drills per step
Item = tuple[Row, int, Tensor, str]
"""A row, the index of its image (-1 without one), [n] bool patches that the answer depends on, and its family."""
HINTS = ("look", "pick", "judge", "own", "read")  # losses whose weight fades out
NOWHERE = torch.zeros(N_PATCHES, dtype=torch.bool)


def answer_words(speller: Speller, seed: int, count: int = 3000) -> list[str]:
    """Collect all words of one token that occur as choices in the first `count` training scenes, and names of icons.

    The options in drills are taken from them, because these are the words that questions make the decoder predict.
    """
    choices = {choice for i in range(count) for q in sample(seed, i, "train").questions for choice in q.choices}
    return sorted(word for word in choices | set(icons()) if " " not in word and len(speller.ids(f" {word}")) == 1)


class Language:
    """The stage that trains the decoder on text-only questions, synthetic look-ups and drills.

    Args:
        llava: the LLaVA model.
        speller: the tokenizer.
        seed: seed of the data.
        rank: number of this process.
        ranks: number of processes that share a batch.
    """

    name = "language"

    def __init__(self, llava: Any, speller: Speller, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.llava, self.speller = llava, speller
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.decoder = Decoder(llava, [speller.ids(f" {letter}")[0] for letter in LETTERS])
        self.hints = Hints(llava.config.text_config.hidden_size)
        self.trained: dict[str, nn.Module] = {
            "decoder": llava.model.language_model,
            "head": llava.lm_head,
            "hints": self.hints,
        }
        self.names = sorted({name for name in icons() if " " not in name} | set("ABCDEFGHKLMPRTXZ"))
        self.answers = answer_words(speller, seed)

    def share(self, count: int) -> int:
        """The share of `count` that one of the processes computes, rounded up."""
        return -(-count // self.ranks)

    def rng(self, step: int) -> np.random.Generator:
        """Random generator of a step in this process."""
        return np.random.default_rng([self.seed, step, self.rank])

    def text_questions(self, rng: np.random.Generator, step: int, count: int, synthetic: float) -> list[Question]:
        """Draw text-only questions.

        Args:
            rng: random generator.
            step: the step, which decides which training scenes are drawn.
            count: number of questions.
            synthetic: probability that a question is a synthetic look-up. The others are questions of the benchmark,
                more often from families that are answered badly.
        """
        easy = 0.08 + 0.6 * (1 - self.hints.of(EASY))
        first = (step * self.ranks + self.rank) * 4096 + 2048 * (synthetic > 0)
        questions: list[Question] = []
        while len(questions) < count:
            if rng.random() < synthetic:
                questions.append(lookup(rng, self.names, easy))
                continue
            family = self.hints.draw(text_families(), rng)
            scene = sample(self.seed + 1, first + len(questions), "train", family=family)
            questions.append(scene.questions[int(rng.integers(len(scene.questions)))])
        return questions

    def text_items(self, rng: np.random.Generator, step: int, count: int) -> list[Item]:
        """Draw text-only rows. The better the look-ups are answered, the fewer of the rows are synthetic."""
        questions = self.text_questions(rng, step, count, 0.12 + 0.63 * (1 - self.hints.of(HARD)))
        return [(self.speller.row(question, image=False), -1, NOWHERE, question.family) for question in questions]

    def loss(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Loss of the batch of a step, and values to log; see `Stage.loss`."""
        rng = self.rng(step)
        total, logged = self.combined({"t": (self.text_items(rng, step, self.share(TEXT_ROWS)), None)}, progress)
        drilled, more = self.drilled(rng)
        placed, order = self.ordered(rng)
        return total + drilled + placed, logged | more | order

    def drilled(self, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """Weighted loss of drills, and values to log. There are fewer drills the better look-ups are answered."""
        count = max(DRILLS // 6, round(DRILLS * (1 - self.hints.of(HARD))))
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

    def ordered(self, rng: np.random.Generator, rows: int = 12, each: int = 24) -> tuple[Tensor, dict[str, float]]:
        """Weighted loss of predicting where words are in the dictionary, and values to log.

        Args:
            rng: random generator.
            rows: number of rows.
            each: number of words in a row, in random order.
        """
        listed = words()
        told, where = list[Tensor](), list[tuple[int, int, float]]()
        for row in range(rows):
            ids = list(self.speller.head)
            for index in rng.choice(len(listed), each, replace=False).tolist():
                ids += self.speller.ids(f" {listed[index]}")
                where.append((row, len(ids) - 1, index / len(listed)))
            told.append(torch.tensor(ids))
        row_of, at, place = torch.tensor(where, dtype=torch.float64).unbind(1)
        padded = nn.utils.rnn.pad_sequence(told, batch_first=True)
        found = order_losses(self.decoder, self.hints, padded, row_of.long(), at.long(), place.float())
        return 0.3 * (found["order"] + found["shelf"]), {key: float(value.detach()) for key, value in found.items()}

    def combined(self, kinds: dict[str, tuple[list[Item], Prefix | None]], progress: float) -> Any:
        """Weighted loss of whole questions, and values to log.

        Args:
            kinds: rows and their prefix, by the name under which they are logged. They are computed in chunks of
                similar length.
            progress: share of the stage's budget that is used up.
        """
        sums: dict[str, Any] = defaultdict(float)
        logged = {"find": self.hints.of(EASY), "lookup": self.hints.of(HARD)}
        for kind, (items, prefix) in kinds.items():
            mine: dict[str, Any] = defaultdict(float)
            items = sorted(items, key=lambda item: len(item[0].ids))
            for part in _parts(items, 4 if prefix is None else 3):
                found = losses(self.decoder, self.hints, _chunk(part), prefix)
                self.hints.mark(found["hit"], [family for *_, family in part])
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

    @torch.no_grad()
    def validate(self, count: int = 300) -> dict[str, Any]:
        """Accuracy by family on text-only questions of the validation split."""
        questions = [sample(0, i, "val", modality="text").questions[0] for i in range(count)]
        items = [(self.speller.row(question, image=False), -1, NOWHERE, question.family) for question in questions]
        right: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        self.score(items, None, right)
        return summary(right)

    def score(self, items: list[Item], prefix: Prefix | None, right: dict[str, list[int]]) -> None:
        """Answer questions, and add their results to `right`: [right answers, questions] of each family."""
        for part in _parts(sorted(items, key=lambda item: len(item[0].ids)), max(1, len(items) // 64)):
            rows = _chunk(part)
            for guess, row, (*_, family) in zip(letters(self.decoder, rows, prefix), rows.answer, part, strict=True):
                right[family][0] += int(guess == row)
                right[family][1] += 1


def fade(progress: float) -> float:
    """Weight of the hints: 1 for the first 60 % of the budget, then falling to 0 at 90 %."""
    return min(1.0, max(0.0, (0.9 - progress) / 0.3))


def _chunk(items: list[Item]) -> Chunk:
    rows, images, patches, _ = zip(*items, strict=True)
    return chunk(rows, images, patches)


def _parts(items: list[Any], count: int) -> list[list[Any]]:
    """Split a list into at most `count` parts of about the same length."""
    bounds = np.linspace(0, len(items), count + 1).astype(int)
    return [items[a:b] for a, b in itertools.pairwise(bounds) if b > a]


def summary(right: dict[str, list[int]]) -> dict[str, Any]:
    """Accuracy over all questions and of each family, from [right answers, questions] of each family."""
    hits, n = (sum(v[i] for v in right.values()) for i in (0, 1))
    families = {key: round(v[0] / v[1], 3) for key, v in sorted(right.items())}
    return {"val": round(hits / n, 4), "val_n": n, "families": families}
