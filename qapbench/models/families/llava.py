"""LLaVA-1.5, and other models that load as `LlavaForConditionalGeneration` with a CLIP or SigLIP tower."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qapbench.methods.tokens import VisionTokens
from qapbench.models.encoded import EncodedImages, Views
from qapbench.models.family import TINY_TEXT, TINY_TOWER, family
from qapbench.models.outline import ImageOutline, Size, blank_tokens
from qapbench.models.tower import TowerFamily, scaled, smaller_grid

CLIP_L_336 = "openai/clip-vit-large-patch14-336"  # hub id of the CLIP whose tower LLaVA-1.5 took over


@family("llava")
class Llava(TowerFamily):
    """One square view per image, one token per patch."""

    image_inputs = ("pixel_values", "image_sizes")

    @classmethod
    def default_text_tower(cls, config: Mapping[str, Any]) -> str | None:
        """CLIP-L/14 at 336 pixels if the vision tower has exactly its shape, else None."""
        vision = config.get("vision_config") or {}
        shape = tuple(vision.get(key) for key in ("hidden_size", "num_hidden_layers", "image_size", "patch_size"))
        return CLIP_L_336 if shape == (1024, 24, 336, 14) else None

    def complete(self, processor: Any) -> None:
        """Also set the patch size and the way of dropping the CLS token, which older processors lack."""
        super().complete(processor)
        if processor.patch_size is None:
            processor.patch_size = self.vision.patch_size
            processor.num_additional_image_tokens = self.skip  # CLIP's CLS token, which the strategy below drops again
        if processor.vision_feature_select_strategy is None:
            processor.vision_feature_select_strategy = self.model.config.vision_feature_select_strategy

    def encode_images(self, inputs: Mapping[str, Any], needs: frozenset[str]) -> EncodedImages:
        """Run vision tower and projector on the images; see `Family.encode_images`."""
        return EncodedImages.whole(self.see(inputs["pixel_values"], needs))

    @torch.no_grad()
    def see(self, pixels: Tensor, needs: frozenset[str]) -> VisionTokens:
        """Run vision tower and projector on images.

        Args:
            pixels: [B, 3, H, W].
            needs: fields of `VisionTokens` to record in addition to `projected`.
        """
        with self.recording(needs) as captured:
            self.model.model.get_image_features(pixel_values=pixels, return_dict=True)
        return VisionTokens(**self.fields(captured, needs, pixels))

    def outline(self, sizes: Sequence[Size]) -> ImageOutline:
        """One view per image, whatever its size; see `Family.outline`."""
        count = int(self.view_tokens or 0)
        side = math.isqrt(count)
        tokens = blank_tokens(len(sizes), count, (side, side))
        return self._outlined(EncodedImages.whole(tokens), len(sizes))

    def outline_downsampled(self, sizes: Sequence[Size], count: int) -> ImageOutline:
        """Smaller square images; see `Family.outline_downsampled`."""
        side = math.isqrt(int(self.view_tokens or 0))
        grid = smaller_grid((side, side), count)
        held = math.prod(grid)
        layers = len(self.model.model.vision_tower.encoder.layers)
        encoded = EncodedImages.whole(blank_tokens(len(sizes), held, grid))
        attended = ((held + self.skip,) * len(sizes),) * layers
        return ImageOutline(encoded, attended, held * len(sizes), held * len(sizes))

    @property
    def available_fields(self) -> frozenset[str]:
        """All fields of the vision tower, and the image at a lower size."""
        return super().available_fields | {"downsampled"}

    @torch.no_grad()
    def downsampled(self, inputs: Mapping[str, Any], count: int, views: Views) -> Tensor:
        """The images at a lower size, with position embeddings interpolated; see `Family.downsampled`."""
        pixels, patch = inputs["pixel_values"], self.vision.patch_size
        height, width = (side // patch for side in pixels.shape[-2:])
        rows, columns = smaller_grid((height, width), count)
        small = scaled(pixels[views.owners], (rows * patch, columns * patch))
        made = self.model.model.get_image_features(pixel_values=small, interpolate_pos_encoding=True, return_dict=True)
        return torch.stack(list(made.pooler_output)).mT.unflatten(-1, (rows, -1))

    @classmethod
    def tiny(cls) -> tuple[Any, dict[str, Any]]:
        """A random CLIP and Llama, and one prompt with an image of 4 x 4 tokens."""
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
