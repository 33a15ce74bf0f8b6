"""The stage that trains the companion CLIP, in whose joint space the patches of an image are compared to a question."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qapbench.tasks.diagramqa.generate import sample
from qapbench.tasks.diagramqa.scene import Question, Scene

from .labels import covered
from .model import BOS, CLIP_TEXT_LEN, EOS, PATCHES_SEEN
from .rows import Speller
from .vision import pixels_of, see

IMAGES, QUESTIONS = 24, 2  # images per step, and questions per image


class Scales(nn.Module):
    """Scale (as a logarithm) and bias of the similarities in the two losses on patches. They exist only in training."""

    def __init__(self) -> None:
        super().__init__()
        self.aux_scale = nn.Parameter(torch.tensor([2.3, 2.3]))
        self.aux_bias = nn.Parameter(torch.tensor([-1.0, -4.0]))


def question_text(question: Question, rng: np.random.Generator) -> str:
    """Join a question, its hint and its choices in one of the ways that a caller may use, drawn at random."""
    parts = [question.question, question.hint, *question.choices]
    if rng.random() < 0.2:
        parts = [question.question]
    elif rng.random() < 0.3:
        parts = [question.hint, question.question, *question.choices]
    return (" " if rng.random() < 0.5 else "\n").join(p for p in parts if p)


class Companion:
    """The stage that trains CLIP's text tower and its two projections, while the vision tower stays fixed.

    The loss is contrastive, over three kinds of pairs: a question and the patches that its answer depends on, against
    the other patches of the same image; the name of a thing and its patches, against all patches of the batch; a
    caption and the CLS token of its image, against those of the other images.

    Args:
        llava: the LLaVA model, whose vision tower is used.
        clip: the companion CLIP, which has the same vision tower.
        speller: the tokenizer.
        seed: seed of the data.
        rank: number of this process.
        ranks: number of processes that share a batch.
    """

    name = "companion"

    def __init__(self, llava: Any, clip: Any, speller: Speller, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.llava, self.clip, self.speller = llava, clip, speller
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.scales = Scales()
        self.trained: dict[str, nn.Module] = {
            "text": clip.text_model,
            "text_projection": clip.text_projection,
            "scales": self.scales,
            "visual_projection": clip.visual_projection,
            "post_norm": clip.vision_model.post_layernorm,
        }

    def embed(self, texts: list[str]) -> Tensor:
        """Embed T texts in the joint space: [T, P], normalised. Long texts are cut off."""
        start, stop = self.speller.ids(BOS), self.speller.ids(EOS)
        rows = [start + self.speller.ids(text)[: CLIP_TEXT_LEN - 2] + stop for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        pooled = self.clip.text_model(input_ids=ids, attention_mask=(ids != 0).long()).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=-1)

    def space(self, states: Tensor) -> Tensor:
        """Project states [..., C] of the vision tower into the joint space: [..., P], normalised."""
        return F.normalize(self.clip.visual_projection(self.clip.vision_model.post_layernorm(states)), dim=-1)

    def loss(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Loss of the batch of a step, and values to log; see `Stage.loss`."""
        del progress
        first = (step * self.ranks + self.rank) * IMAGES
        scenes = [sample(self.seed + 2, first + i, "train", modality="image") for i in range(-(-IMAGES // self.ranks))]
        return self.score(scenes, np.random.default_rng([self.seed, step, self.rank]))

    def score(self, scenes: list[Scene], rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        """Loss of a batch of scenes, and values to log. Captions and texts of questions are drawn with `rng`."""
        with torch.no_grad():
            patches, cls = see(self.llava, pixels_of(scenes))
        local, whole = self.space(patches), self.space(cls)
        asked = [(i, q) for i, scene in enumerate(scenes) for q in scene.questions[:QUESTIONS]]
        named = [(i, t) for i, scene in enumerate(scenes) for t in scene.things[:3]]
        captions = [" ".join(scene.facts[i] for i in rng.permutation(len(scene.facts))[:4]) for scene in scenes]
        texts = self.embed([question_text(q, rng) for _, q in asked] + [t.name for _, t in named] + captions)
        question, name, caption = texts.split([len(asked), len(named), len(scenes)])
        scale, bias = self.scales.aux_scale.exp(), self.scales.aux_bias
        # A question is compared only with patches of its own image: its "top left" may be as relevant in another one.
        own = torch.einsum("qd,qpd->qp", question, local[torch.tensor([i for i, _ in asked])]) * scale[0] + bias[0]
        relevance = _balanced(own, torch.stack([covered(q.relevant) > PATCHES_SEEN for _, q in asked]))
        every = torch.einsum("td,ipd->tip", name, local) * scale[1] + bias[1]
        marks = torch.stack([torch.stack([_named(scene, t.name) for scene in scenes]) for _, t in named])
        naming = _balanced(every.flatten(1), marks.flatten(1))
        pair = whole @ caption.T * 20
        target = torch.arange(len(scenes))
        contrast = (F.cross_entropy(pair, target) + F.cross_entropy(pair.T, target)) / 2
        logged = {
            "relevance": float(relevance.detach()),
            "naming": float(naming.detach()),
            "caption": float(contrast.detach()),
            "caption_acc": float((pair.argmax(1) == target).float().mean()),
        }
        return relevance + 0.5 * naming + 0.2 * contrast, logged

    @torch.no_grad()
    def validate(self, count: int = 96) -> dict[str, Any]:
        """The values to log, on scenes of the validation split."""
        scenes = [sample(0, i, "val", modality="image") for i in range(count)]
        _, logged = self.score(scenes, np.random.default_rng(0))
        return {f"val_{key}": round(value, 4) for key, value in logged.items()}


def _named(scene: Scene, name: str) -> Tensor:
    """[N] bool, the patches that show a thing of this name."""
    return covered([thing.box for thing in scene.things if thing.name == name]) > PATCHES_SEEN


def _balanced(logit: Tensor, positive: Tensor) -> Tensor:
    """Mean binary cross-entropy over rows, in which positives and negatives have the same total weight.

    Args:
        logit: [R, N] scores.
        positive: [R, N] bool, which of them should be high. Rows without any are left out.
    """
    some = positive.any(1)
    logit, positive = logit[some], positive[some]
    each = F.binary_cross_entropy_with_logits(logit, positive.float(), reduction="none")
    share = positive.float()
    hit = (each * share).sum(1) / share.sum(1)
    miss = (each * (1 - share)).sum(1) / (1 - share).sum(1).clamp(min=1)
    return (hit + miss).mean()
