"""The CLIP joint space in which an image's patches meet the question."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qapbench.checkpoints import find_checkpoint
from qapbench.errors import UserError, first_line
from qapbench.tokens import VisionTokens

BESIDE = "clip"  # folder of the companion inside a model's own


class TextTower:
    """A CLIP text tower and the two projections of its joint space, from any CLIP checkpoint folder.

    LLaVA's own checkpoints hold a vision tower but neither the text tower nor the projections; this is their
    companion. The vision encoder of the companion is dropped after loading.

    Args:
        folder: what `CLIPModel.from_pretrained` can load (safetensors), with its tokenizer.
        vision_width: hidden size of the model's own vision tower; the joint space must fit it.
    """

    def __init__(self, folder: str | Path, vision_width: int, device: torch.device | str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPModel

        try:
            clip: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # OSError, ValueError, SafetensorError, RuntimeError: no common base
            raise UserError(
                f"text_tower: cannot load a CLIP checkpoint from '{folder}': {first_line(error)}"
            ) from error
        width = clip.config.vision_config.hidden_size
        if width != vision_width:
            raise UserError(
                f"text_tower: '{folder}' belongs to a vision tower of width {width}, the model's has {vision_width}"
            )
        clip = clip.eval().requires_grad_(False).to(device)
        self.text: nn.Module = clip.text_model
        self.text_projection: nn.Module = clip.text_projection
        self.visual_norm: nn.Module = clip.vision_model.post_layernorm
        self.visual_projection: nn.Module = clip.visual_projection
        self.length: int = clip.config.text_config.max_position_embeddings
        self.device = torch.device(device)

    @torch.inference_mode()
    def embed_patches(self, patches: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, P], float32: post-layernorm and visual projection, as CDPruner applies them."""
        return self.visual_projection(self.visual_norm(patches.float()))

    @torch.inference_mode()
    def embed_text(self, text: str) -> Tensor:
        """One text -> [1, M, P], float32, where M segments hold all of it.

        As in CDPruner's code nothing is truncated: token ids are padded with zeros to a multiple of the context
        length and cut into segments. Only the last segment holds the end token that CLIP pools at; the others are
        pooled at their first token.
        """
        ids = self.tokenizer(text, return_tensors="pt", truncation=False, verbose=False).input_ids[0]
        segments = -(-len(ids) // self.length)
        padded = ids.new_zeros(segments * self.length)
        padded[: len(ids)] = ids
        out = self.text(input_ids=padded.view(segments, self.length).to(self.device))
        return self.text_projection(out.pooler_output).unsqueeze(0)


@functools.lru_cache(maxsize=64)
def find_tower(
    named: str | None, model_folder: str, default: str | None, fetch: bool = True
) -> tuple[Path | None, str]:
    """(folder of the companion CLIP, "") or (None, why there is none).

    In this order: as named; `clip/` in the model's own folder; the hub checkpoint whose vision tower the model took
    over. Where none can be had, relevance falls back on the language model's embeddings. Looked for once a process.

    Raises:
        UserError: one is named and cannot be had.
    """
    if named:
        return find_checkpoint(named, "text_tower", fetch).folder, ""
    if model_folder and (Path(model_folder) / BESIDE).is_dir():
        return Path(model_folder) / BESIDE, ""
    if default is None:
        return None, "no CLIP text tower is known for this model"
    try:
        return find_checkpoint(default, "text_tower", fetch).folder, ""
    except UserError as error:
        return None, str(error)


@functools.lru_cache(maxsize=2)
def load_tower(folder: Path, vision_width: int, device: torch.device) -> TextTower:
    """The tower, loaded once for all runs of a process."""
    return TextTower(folder, vision_width, device)


class QuestionReader:
    """Adds the fields of VisionTokens that concern the question.

    With a text tower, image and text meet in its joint space. Without one, relevance falls back on the language
    model: projected tokens beside the mean embedding of the prompt's tokens.
    """

    FIELDS = frozenset({"image_embeds", "text_embeds", "prompt_embeds"})

    def __init__(self, needs: frozenset[str], tower: TextTower | None, embed: Callable[[Tensor], Tensor]) -> None:
        self.needs = needs & self.FIELDS
        self.tower = tower
        self.embed = embed

    @property
    def visual(self) -> frozenset[str]:
        """What the model must record for these fields."""
        return frozenset({"patches"}) if self.tower and "image_embeds" in self.needs else frozenset()

    @property
    def needs_text(self) -> bool:
        """Whether the question is read as text, and not only as token ids."""
        return self.tower is not None and "text_embeds" in self.needs

    def fields(
        self, image: VisionTokens, text: str | None, prompt: Tensor,
        of_image: dict[Hashable, Any] | None = None, of_question: dict[Hashable, Any] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The question's fields for one image.

        Args:
            image: its tokens, or those of its B views.
            text: the question for the text tower.
            prompt: [L] token ids of the prompt without placeholders and padding.
            of_image, of_question: what was computed before for this image, and for this question.
        """
        of_image, of_question = {} if of_image is None else of_image, {} if of_question is None else of_question
        embedded = recalled(of_question, "prompt_embeds", lambda: self.embed(prompt).unsqueeze(0))
        tower = self.tower
        if tower is None:
            mean = embedded.mean(dim=1, keepdim=True)
            found = {"image_embeds": image.projected, "text_embeds": mean, "prompt_embeds": embedded}
        else:
            found = {"prompt_embeds": embedded}
            if "image_embeds" in self.needs:
                patches = image.require("patches", "the text tower")
                key = ("image_embeds", id(tower))
                found["image_embeds"] = recalled(of_image, key, lambda: tower.embed_patches(patches))
            if "text_embeds" in self.needs:
                if text is None:
                    raise UserError("relevance needs the question: pass `relevance_text=`, or `compress` a processor")
                found["text_embeds"] = recalled(of_question, ("text_embeds", id(tower)), lambda: tower.embed_text(text))
        return {name: value.expand(image.batch, -1, -1) for name, value in found.items() if name in self.needs}


def recalled(memo: dict[Hashable, Any], key: Hashable, make: Callable[[], Any]) -> Any:
    """The value under a key, made where it is not there."""
    if key not in memo:
        memo[key] = make()
    return memo[key]
