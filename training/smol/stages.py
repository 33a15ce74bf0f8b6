"""The stages of the training of `smol-llava`, which `training.loop.Loop` runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch.utils.data import Dataset

from qapbench.tasks.diagramqa.generate import sample
from qapbench.tasks.diagramqa.scene import Scene
from training.companion import IMAGES, Companion
from training.labels import Labeller
from training.vision import MEAN, STD, Vision, see

from .model import lora_weights
from .packs import END, LETTER, WORDS, Feed, Mix, Packs, collate, visible

QUESTIONS = {LETTER: 1.0, END: 0.1, WORDS: 0.05}
WEIGHTS = {"projector": {LETTER: 1.0, END: 0.1, WORDS: 0.2}, "joint": QUESTIONS, "fitted": QUESTIONS}
"""Weight of a target token, by stage and by kind.

A caption has dozens of tokens. In the stage `projector`, captions dominate the loss. In `joint` and `fitted`, questions
do, and captions make sure that the visual tokens still describe the whole image.
"""
LABELS = 0.2
"""Weight of the loss on labels of patches and of the image. Without it, the CLS token would drift, on whose attention
some pruners rely."""
# Peak learning rates, by stage and by part of the model.
RATES = {
    "projector": {"projector": 2e-3, "heads": 2e-3},
    "joint": {"projector": 5e-4, "tower": 3e-4, "heads": 1e-3, "lora": 5e-4},
    # The weights of a projector in closed form are so small that 5e-4 would undo it within a few steps.
    "fitted": {"projector": 3e-5, "tower": 5e-5, "heads": 1e-3, "lora": 1e-3},
}
CHECKS = 384  # packs of the validation split


class Seeing:
    """The stages `projector`, `joint` and `fitted`: questions and captions of images, and text-only questions.

    Args:
        name: "projector" trains the projector alone, as LLaVA's first stage does; "joint" trains the vision tower and
            LoRA, too; "fitted" is "joint" after a projector in closed form. All train the heads of `vision`, too.
        llava: the LLaVA model.
        adapted: the decoder with LoRA, from `add_lora`; its other weights stay fixed.
        vision: compares what patches and CLS tokens predict to labels.
        data: training packs.
        checks: validation packs.
        batch: number of packs per step.
        workers: number of processes that draw packs.
        bf16: whether to compute in bfloat16; the model must have been converted by `halve`.
        count: number of validation packs.
    """

    def __init__(
        self,
        name: str,
        llava: Any,
        adapted: nn.Module,
        vision: Vision,
        data: Packs,
        checks: Packs,
        batch: int,
        workers: int,
        bf16: bool = False,
        count: int = CHECKS,
    ) -> None:
        self.name, self.llava, self.checks, self.batch = name, llava, checks, batch
        self.bf16, self.count, self.device = bf16, count, llava.device
        self.feed = Feed(data, batch, workers, pin=self.device.type == "cuda")
        self.letters = torch.tensor(data.wording.letters, device=self.device)
        self.image = data.wording.image
        self.vision = vision
        parts: dict[str, nn.Module] = {
            "projector": llava.model.multi_modal_projector,
            "tower": llava.model.vision_tower,
            "lora": lora_weights(adapted),
            "heads": vision.heads,
        }
        llava.requires_grad_(False)
        self.trained = {part: parts[part].requires_grad_(True) for part in RATES[name]}

    def optimizer(self) -> torch.optim.Optimizer:
        """Build AdamW with one parameter group for each trained part."""
        groups = [
            {"params": list(module.parameters()), "lr": RATES[self.name][part], "base_lr": RATES[self.name][part]}
            for part, module in self.trained.items()
        ]
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=self.device.type == "cuda")

    def loss(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Loss of the batch of a step, and values to log; see `Stage.loss`."""
        del progress
        return self.score({k: v.to(self.device, non_blocking=True) for k, v in self.feed.at(step).items()})

    def score(self, batch: dict[str, Tensor], blank: bool = False) -> tuple[Tensor, dict[str, float]]:
        """Weighted loss of a batch, and values to log.

        Args:
            batch: a batch from `collate`, on the device.
            blank: whether to replace every image by a grey one.
        """
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
        # peft would otherwise cast the input of every linear layer to float32, the type of LoRA's weights.
        with half, disable_input_dtype_casting(self.llava.model.language_model, self.bf16):
            logits, patches, cls = self.forward(batch, blank)
        kind = batch["kind"][(due := batch["kind"] > 0)]
        target = batch["target"][due]
        each = F.cross_entropy(logits.float(), target, reduction="none")
        weight = torch.zeros_like(each)
        for which, share in WEIGHTS[self.name].items():
            weight[kind == which] = share
        total = (each * weight).sum() / weight.sum()
        seen = (batch["ids"] == self.image).any(1)[:, None].expand_as(due)[due]
        hit = self.letters[logits[:, self.letters].argmax(-1)] == target
        logged = {}
        for key, chosen in (("image", (kind == LETTER) & seen), ("text", (kind == LETTER) & ~seen)):
            if n := int(chosen.sum()):
                logged[f"{key}_acc"] = float(hit[chosen].float().mean())
                logged[f"{key}_n"] = float(n)
        if n := int((kind == WORDS).sum()):
            logged |= {"words": float(each.detach()[kind == WORDS].mean()), "words_n": float(n)}
        if patches is not None and "labels" in batch:
            patch, whole, found = self.vision.told(patches.float(), cls.float(), batch["labels"])
            logged |= {"labels": float(patch.detach()), "cls": float(whole.detach()), "labels_right": found["right"]}
            total = total + LABELS * (patch + 0.2 * whole)
        return total, logged

    def forward(self, batch: dict[str, Tensor], blank: bool = False) -> tuple[Tensor, Any, Any]:
        """Run the model on a batch from `collate`.

        Args:
            batch: the batch, on the device.
            blank: whether to replace every image by a grey one.

        Returns:
            [T, V] logits at the positions that have a target; [I, N, C] patches before the projector and [I, C] CLS
            tokens of the I images, or None if there are none.
        """
        model = self.llava.model
        embeds, patches, cls = model.get_input_embeddings()(batch["ids"]), None, None
        if "pixels" in batch:
            pixels = batch["pixels"].permute(0, 3, 1, 2).float() / 255
            pixels = (pixels - MEAN.to(self.device)) / STD.to(self.device)
            patches, cls = see(self.llava, torch.zeros_like(pixels) if blank else pixels)
            features = model.multi_modal_projector(patches).to(embeds.dtype)
            embeds = embeds.masked_scatter((batch["ids"] == self.image)[..., None], features)
        hidden = model.language_model(
            inputs_embeds=embeds,
            attention_mask=visible(batch["segment"]),
            position_ids=batch["position"],
            use_cache=False,
        ).last_hidden_state
        return self.llava.lm_head(hidden[batch["kind"] > 0]), patches, cls

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """How well the validation split is answered: with images, with grey ones in their place, and text-only.

        Letters count as right or wrong. Of captions it is the mean loss of a token, which tells long before letters do
        whether the image is read.
        """
        sums: dict[str, float] = {}
        for first in range(0, self.count, self.batch):
            packs = collate([self.checks[i] for i in range(first, min(first + self.batch, self.count))])
            batch = {key: value.to(self.device) for key, value in packs.items()}
            for prefix, blank in (("", False), ("blank_", True)):
                _, found = self.score(batch, blank)
                for key, value in (("image", "image_acc"), ("text", "text_acc"), ("words", "words")):
                    if f"{key}_n" in found and not (blank and key == "text"):
                        n, own = found[f"{key}_n"], f"{prefix}{key}"
                        sums[own] = sums.get(own, 0) + found[value] * n
                        sums[f"{own}_n"] = sums.get(f"{own}_n", 0) + n
        kinds = [key for key in sums if not key.endswith("_n")]
        return {f"val_{key}": round(sums[key] / sums[f"{key}_n"], 4) for key in kinds} | {
            f"val_{key}_n": int(sums[f"{key}_n"]) for key in kinds
        }


class Scenes(Dataset[Scene]):
    """The training scenes that have an image, by index."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __len__(self) -> int:
        return 2**40

    def __getitem__(self, index: int) -> Scene:
        return sample(self.seed, index, "train", modality="image")


class FedCompanion(Companion):
    """The stage `companion`: like `Companion`, but on any device and with scenes that other processes draw ahead."""

    def __init__(self, llava: Any, clip: Any, speller: Any, seed: int, workers: int) -> None:
        self.device = llava.device
        with torch.device(self.device):
            super().__init__(llava, clip, speller, seed)
        llava.requires_grad_(False)
        for module in self.trained.values():
            module.requires_grad_(True)
        self.feed = Feed(Scenes(seed + 2), IMAGES, workers, join=list)

    def optimizer(self) -> torch.optim.Optimizer:
        """Build AdamW for all trained parameters."""
        params = [p for module in self.trained.values() for p in module.parameters()]
        group = {"params": params, "lr": 1e-3, "base_lr": 1e-3}
        return torch.optim.AdamW([group], betas=(0.9, 0.98), weight_decay=0.0)

    def loss(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        del progress
        scenes = self.feed.at(step)
        with torch.device(self.device):
            return self.score(scenes, np.random.default_rng([self.seed, step]))

    @torch.no_grad()
    def validate(self, count: int = 96) -> dict[str, Any]:
        with torch.device(self.device):
            return super().validate(count)


def packs_for(wording: Any, labeller: Labeller, seed: int, mix: Mix) -> tuple[Packs, Packs]:
    """Make the training packs, of a mixture of chats, and the validation packs."""
    return Packs(wording, labeller, seed, mix=mix), Packs(wording, labeller, 0, "val")
