"""LLaVA-1.5 and whatever else loads as `LlavaForConditionalGeneration` with a CLIP or SigLIP tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qapbench.tokens import VisionTokens

from .family import TINY_TEXT, TINY_TOWER, family
from .tower import TowerFamily
from .views import Seen

CLIP_L_336 = "openai/clip-vit-large-patch14-336"


@family("llava")
class Llava(TowerFamily):
    """One square picture an image, every patch a token."""

    image_inputs = ("pixel_values", "image_sizes")

    @classmethod
    def default_text_tower(cls, config: Mapping[str, Any]) -> str | None:
        vision = config.get("vision_config") or {}
        shape = tuple(vision.get(key) for key in ("hidden_size", "num_hidden_layers", "image_size", "patch_size"))
        return CLIP_L_336 if shape == (1024, 24, 336, 14) else None

    def complete(self, processor: Any) -> None:
        super().complete(processor)
        if processor.patch_size is None:
            processor.patch_size = self.vision.patch_size
            processor.num_additional_image_tokens = self.skip  # CLIP's CLS, which the strategy below drops again
        if processor.vision_feature_select_strategy is None:
            processor.vision_feature_select_strategy = self.model.config.vision_feature_select_strategy

    def look(self, inputs: Mapping[str, Any], needs: frozenset[str]) -> Seen:
        return Seen.whole(self.see(inputs["pixel_values"], needs))

    @torch.no_grad()
    def see(self, pixels: Tensor, needs: frozenset[str]) -> VisionTokens:
        """The tokens of images [B, 3, H, W]."""
        with self.recording(needs) as seen:
            self.model.model.get_image_features(pixel_values=pixels, return_dict=True)
        return VisionTokens(**self.fields(seen, needs, pixels))

    @classmethod
    def tiny(cls) -> tuple[Any, dict[str, Any]]:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        vision, text = CLIPVisionConfig(**TINY_TOWER), LlamaConfig(**TINY_TEXT)
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, image_seq_length=16)
        model = LlavaForConditionalGeneration(config).eval()
        ids = torch.tensor([[1, 9, 8, *[3] * 16, 7, 6, 5]])
        return model, {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.rand(1, 3, 32, 32),
        }
