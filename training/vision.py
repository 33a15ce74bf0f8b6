"""The vision tower's stage: what is true of each patch, and, for the CLS token, of the whole image."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qapbench.tasks.diagramqa.generate import sample
from qapbench.tasks.diagramqa.scene import Scene

from .labels import Labeller
from .reading import Symbols

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
IMAGES = 32
WEIGHTS = {"patch": 1.0, "cls": 0.2, "early": 0.3, "looked": 0.2, "off": 2.0}
SHOWN = ("name", "across", "eater", "count", "rank", "share", "place")  # slots in the learning curve


def pixels_of(scenes: list[Scene]) -> Tensor:
    """[B, 3, H, W], as CLIP's processor normalises."""
    images = np.stack([np.asarray(scene.image) for scene in scenes])
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def see(llava: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Patches of hidden state -2, which the projector takes, and the CLS token of the last layer."""
    states = llava.model.vision_tower(pixels.to(llava.device), output_hidden_states=True)
    return states.hidden_states[-2][:, 1:], states.last_hidden_state[:, 0]


def counted(names: Tensor) -> Tensor:
    """Which patches [B, N] enter a loss: half of an image is background, of which a fifth is enough."""
    return (names > 0) | (torch.arange(names.shape[1], device=names.device) % 5 == 0)


class Heads(nn.Module):
    """Heads that exist only in training: values of slots, per patch and for the image; names one block earlier."""

    def __init__(self, width: int, values: int, names: int) -> None:
        super().__init__()
        self.aux_early = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, names))
        self.aux_norm = nn.LayerNorm(width)
        self.aux_patch = nn.Linear(width, values)
        self.aux_image = nn.Linear(width, values)


class Vision:
    """Trains the vision tower alone."""

    name = "vision"

    def __init__(self, llava: Any, labeller: Labeller, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.llava, self.labeller = llava, labeller
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.heads = Heads(llava.config.vision_config.hidden_size, sum(labeller.sizes), labeller.sizes[0])
        self.trained: dict[str, nn.Module] = {"tower": llava.model.vision_tower, "heads": self.heads}

    def loss(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        del progress
        first = (step * self.ranks + self.rank) * IMAGES
        scenes = [sample(self.seed + 1, first + i, "train", modality="image") for i in range(-(-IMAGES // self.ranks))]
        return self.score(scenes)

    def score(self, scenes: list[Scene]) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of slots at patches and of what the CLS token says of the image, and what to log."""
        with self._watched() as seen:
            patches, cls = see(self.llava, pixels_of(scenes))
        labels = self.labeller.all_patches(scenes)
        patch, whole, logged = self.told(patches, cls, labels)
        names = labels[..., self.labeller.places["name"]]
        early = F.cross_entropy(self.heads.aux_early(seen["input"][:, 1:])[names > 0], names[names > 0])
        looked = self._looked(seen, scenes)
        logged = {key: value for key, value in logged.items() if key in ("right", *SHOWN)}
        parts = {"patch": patch, "cls": whole, "early": early, "looked": looked, **self.besides(patches, labels)}
        logged |= {key: float(value.detach()) for key, value in parts.items()}
        return torch.stack([WEIGHTS[key] * value for key, value in parts.items()]).sum(), logged

    def besides(self, patches: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Further losses on patches [B, N, C] with their labels [B, N, slots]."""
        del patches, labels
        return {}

    def told(self, patches: Tensor, cls: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Cross-entropy of slots at patches [B, N, C], and of what CLS tokens [B, C] say of the image; shares right.

        Args:
            labels: [B, N, slots], as the labeller gives them, on the same device.
        """
        total, means, logged = torch.zeros((), device=labels.device), list[Tensor](), dict[str, float]()
        parts = self.heads.aux_patch(self.heads.aux_norm(patches)).split(self.labeller.sizes, dim=-1)
        right = said = 0
        for (slot, place), scores in zip(self.labeller.places.items(), parts, strict=True):
            label = labels[..., place]
            kept = (label >= 0) if slot != "name" else counted(label)
            if not kept.any():
                continue
            loss = F.cross_entropy(scores[kept], label[kept], reduction="sum")
            total, means = total + loss, [*means, loss / kept.sum()]
            hits = scores[kept].argmax(-1) == label[kept]
            logged[slot] = float(hits.float().mean())
            right, said = right + int(hits.sum()), said + len(hits)
        starts = torch.tensor([0, *self.labeller.sizes[:-1]], device=labels.device).cumsum(0)
        bag = torch.zeros(len(labels), sum(self.labeller.sizes), device=labels.device)
        image, _, which = (there := labels >= 0).nonzero().unbind(1)
        bag[image, starts[which] + labels[there]] = 1
        bag[:, 0] = 0
        bag = bag / bag.sum(-1, keepdim=True).clamp(min=1)
        whole = -(self.heads.aux_image(F.layer_norm(cls, cls.shape[-1:])).log_softmax(-1) * bag).sum(-1).mean()
        # Every label counts, and every slot: relations have few labels and are the hardest to see.
        return 0.5 * total / said + 0.5 * torch.stack(means).mean(), whole, {"right": right / said} | logged

    @contextlib.contextmanager
    def _watched(self) -> Iterator[dict[str, Tensor]]:
        """What goes into the block whose output the projector takes, and its queries and keys."""
        seen: dict[str, Tensor] = {}
        block = self.llava.model.vision_tower.encoder.layers[-2]

        def keep(name: str) -> Any:
            return lambda module, args, output: seen.__setitem__(name, output)

        handles = [
            block.layer_norm1.register_forward_pre_hook(lambda module, args: seen.__setitem__("input", args[0])),
            block.self_attn.q_proj.register_forward_hook(keep("queries")),
            block.self_attn.k_proj.register_forward_hook(keep("keys")),
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _looked(self, seen: dict[str, Tensor], scenes: list[Scene]) -> Tensor:
        """How far one head for each relation is from looking at the related thing: mean -log of the attention there.

        Without this hint, relations stayed at chance for 26,000 images while names were learnt.
        """
        heads = self.llava.config.vision_config.num_attention_heads
        image, head, patch, targets = [], [], [], []
        for i, scene in enumerate(scenes):
            for relation, source, target in self.labeller.relations(scene):
                at = source.nonzero().flatten().tolist()
                image += [i] * len(at)
                head += [relation] * len(at)
                patch += at
                targets += [target] * len(at)
        if not image:
            return torch.zeros(())
        which = torch.tensor(image), torch.tensor(head)
        query, key = (seen[name].unflatten(-1, (heads, -1)).transpose(1, 2)[which] for name in ("queries", "keys"))
        row = query[torch.arange(len(patch)), torch.tensor(patch) + 1]
        attention = (torch.einsum("rd,rnd->rn", row, key) / row.shape[-1] ** 0.5).log_softmax(-1)[:, 1:]
        marks = torch.stack(targets)
        some = marks.any(1)
        return -attention[some].masked_fill(~marks[some], -torch.inf).logsumexp(-1).mean()

    @torch.no_grad()
    def validate(self, count: int = 192) -> dict[str, Any]:
        """The same on scenes of the validation split."""
        _, logged = self.score([sample(0, i, "val", modality="image") for i in range(count)])
        return {f"val_{key}": round(value, 4) for key, value in logged.items()}


class Seeing(Vision):
    """Trains tower and projector to show what the decoder has learnt to read: the symbols of each patch.

    The projector alone cannot make them of a tower that was only asked for labels: 0.25 of their variance was left.
    """

    name = "seeing"

    def __init__(
        self, llava: Any, labeller: Labeller, symbols: Symbols, seed: int, rank: int = 0, ranks: int = 1
    ) -> None:
        super().__init__(llava, labeller, seed, rank, ranks)
        self.symbols = symbols.requires_grad_(False)
        self.projector = llava.model.multi_modal_projector
        self.trained["projector"] = self.projector

    @torch.no_grad()
    def fit_projector(self) -> None:
        """Bring the untrained projector's output to the size of the symbols."""
        scenes = [sample(self.seed + 1, i, "train", modality="image") for i in range(16)]
        patches, _ = see(self.llava, pixels_of(scenes))
        wanted = self.symbols(self.labeller.all_patches(scenes))
        self.projector.linear_1.weight /= patches.std()
        self.projector.linear_2.weight *= wanted.std() / self.projector(patches).std()

    def besides(self, patches: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`off`: what is missing of the symbols' variance, where things are and on a fifth of the background."""
        kept = counted(labels[..., self.labeller.places["name"]])
        wanted = self.symbols(labels[kept])
        return {"off": (self.projector(patches[kept]) - wanted).square().sum() / wanted.square().sum()}
