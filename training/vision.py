"""The stages that train the vision tower.

In `Vision`, it learns to predict labels of each patch and, from the CLS token, labels of the whole image. In `Seeing`,
it learns to show what the decoder can read.
"""

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
IMAGES = 32  # images per step
WEIGHTS = {"patch": 1.0, "cls": 0.2, "early": 0.3, "looked": 0.2, "off": 2.0}
SHOWN = ("name", "across", "eater", "count", "rank", "share", "place")  # slots whose accuracy is logged


def pixels_of(scenes: list[Scene]) -> Tensor:
    """The images of scenes, normalised as by CLIP's processor: [B, 3, H, W]."""
    images = np.stack([np.asarray(scene.image) for scene in scenes])
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def see(llava: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Run the vision tower on pixels [B, 3, H, W].

    Returns:
        [B, N, C] patches of hidden state -2, which the projector takes, and [B, C] CLS tokens of the last layer.
    """
    states = llava.model.vision_tower(pixels.to(llava.device), output_hidden_states=True)
    return states.hidden_states[-2][:, 1:], states.last_hidden_state[:, 0]


def counted(names: Tensor) -> Tensor:
    """Choose the patches that count in a loss: those with a thing, and every fifth of the background.

    About half of an image is background, and a fifth of that is enough.

    Args:
        names: [B, N] labels in the slot "name".

    Returns:
        [B, N] bool.
    """
    return (names > 0) | (torch.arange(names.shape[1], device=names.device) % 5 == 0)


class Heads(nn.Module):
    """Heads that exist only in training. They predict the values of slots.

    Attributes:
        aux_early: predicts the names of things from patches, one block earlier.
        aux_norm: normalises patches for `aux_patch`.
        aux_patch: predicts the values of all slots from patches.
        aux_image: predicts, from the CLS token, the values that occur in the image.
    """

    def __init__(self, width: int, values: int, names: int) -> None:
        super().__init__()
        self.aux_early = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, names))
        self.aux_norm = nn.LayerNorm(width)
        self.aux_patch = nn.Linear(width, values)
        self.aux_image = nn.Linear(width, values)


class Vision:
    """The stage that trains the vision tower alone.

    Args:
        llava: the LLaVA model.
        labeller: labels the patches of scenes.
        seed: seed of the data.
        rank: number of this process.
        ranks: number of processes that share a batch.
    """

    name = "vision"

    def __init__(self, llava: Any, labeller: Labeller, seed: int, rank: int = 0, ranks: int = 1) -> None:
        self.llava, self.labeller = llava, labeller
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.heads = Heads(llava.config.vision_config.hidden_size, sum(labeller.sizes), labeller.sizes[0])
        self.trained: dict[str, nn.Module] = {"tower": llava.model.vision_tower, "heads": self.heads}

    def loss(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Loss of the batch of a step, and values to log; see `Stage.loss`."""
        del progress
        first = (step * self.ranks + self.rank) * IMAGES
        scenes = [sample(self.seed + 1, first + i, "train", modality="image") for i in range(-(-IMAGES // self.ranks))]
        return self.score(scenes)

    def score(self, scenes: list[Scene]) -> tuple[Tensor, dict[str, float]]:
        """Loss of a batch of scenes, and values to log."""
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
        """Further losses of a subclass, by their names in WEIGHTS.

        Args:
            patches: [B, N, C] patches.
            labels: [B, N, slots] labels of the patches.
        """
        del patches, labels
        return {}

    def told(self, patches: Tensor, cls: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Compare what patches and CLS tokens predict to the labels.

        Args:
            patches: [B, N, C] patches.
            cls: [B, C] CLS tokens.
            labels: [B, N, slots] labels from the labeller, on the same device.

        Returns:
            The cross-entropy of the labels of patches; the cross-entropy of CLS tokens with the uniform distribution
            over all values that occur in the image; and the accuracy, over all labels ("right") and by slot.
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
        # Half of the loss is the mean over labels and half is the mean over slots, because relations have few labels
        # and are the hardest to predict.
        return 0.5 * total / said + 0.5 * torch.stack(means).mean(), whole, {"right": right / said} | logged

    @contextlib.contextmanager
    def _watched(self) -> Iterator[dict[str, Tensor]]:
        """Record the input ("input"), the "queries" and the "keys" of the block whose output the projector takes."""
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
        """Mean negative log-attention of things to the things that they are related to, in one head per relation.

        Without this hint, the names of things were learnt, but relations were predicted no better than by chance after
        26,000 images.
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
        """The values to log, on scenes of the validation split."""
        _, logged = self.score([sample(0, i, "val", modality="image") for i in range(count)])
        return {f"val_{key}": round(value, 4) for key, value in logged.items()}


class Seeing(Vision):
    """The stage that trains the vision tower and the projector to show what the decoder can read: symbols of patches.

    The projector alone cannot produce the symbols from a tower that was trained only to predict labels: 0.25 of their
    variance remained unexplained.

    Args:
        llava: the LLaVA model.
        labeller: labels the patches of scenes.
        symbols: the symbols, which stay fixed.
        seed: seed of the data.
        rank: number of this process.
        ranks: number of processes that share a batch.
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
        """Scale the untrained projector so that its output has the standard deviation of the symbols."""
        scenes = [sample(self.seed + 1, i, "train", modality="image") for i in range(16)]
        patches, _ = see(self.llava, pixels_of(scenes))
        wanted = self.symbols(self.labeller.all_patches(scenes))
        self.projector.linear_1.weight /= patches.std()
        self.projector.linear_2.weight *= wanted.std() / self.projector(patches).std()

    def besides(self, patches: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss `off`: the share of the symbols' variance that is missing, on the patches from `counted`."""
        kept = counted(labels[..., self.labeller.places["name"]])
        wanted = self.symbols(labels[kept])
        return {"off": (self.projector(patches[kept]) - wanted).square().sum() / wanted.square().sum()}
