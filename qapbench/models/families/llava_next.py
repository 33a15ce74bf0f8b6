"""LLaVA-NeXT (LLaVA-1.6): a CLIP tower that sees the scaled-down whole image and its tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qapbench.models.anyres import AnyResFamily
from qapbench.models.family import TINY_TEXT, TINY_TOWER, family

from .llava import Llava


@family("llava_next")
class LlavaNext(AnyResFamily):
    """Every tile is pruned by itself.

    A budget of K per view leaves K tokens of the whole image, K of each tile, and the new lines between them.
    """

    default_text_tower = Llava.default_text_tower

    def complete(self, processor: Any) -> None:
        """Also set the patch size and the way of dropping the CLS token, which older processors lack."""
        super().complete(processor)
        if processor.patch_size is None:
            processor.patch_size = self.vision.patch_size
        if processor.vision_feature_select_strategy is None:
            processor.vision_feature_select_strategy = self.model.config.vision_feature_select_strategy
        if not processor.num_additional_image_tokens:
            processor.num_additional_image_tokens = self.skip

    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Pixels and image sizes."""
        return {name: inputs[name] for name in self.image_inputs}

    def tiling(self, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of tiles, chosen by the model's `image_grid_pinpoints`. Every image has tiles."""
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

        config = self.model.config
        return [
            get_anyres_image_grid_shape(size, config.image_grid_pinpoints, self.vision.image_size)
            for size in inputs["image_sizes"]
        ]

    def pack(self, tiles: Tensor, size: Tensor, newline: Tensor, shrink: bool = True) -> Tensor:
        """Join tiles as the model does; see `AnyResFamily.pack`. It never shrinks."""
        strategy = self.model.config.vision_feature_select_strategy
        return self.model.model.pack_image_features([tiles], size[None], strategy, newline)[0][0]

    @classmethod
    def tiny(cls) -> tuple[Any, dict[str, Any]]:
        """A random CLIP and Llama, and one prompt with an image of two tiles."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

        vision, text = CLIPVisionConfig(**TINY_TOWER), LlamaConfig(**TINY_TEXT)
        pinpoints = [[32, 64], [64, 32], [64, 64]]
        config = LlavaNextConfig(
            vision_config=vision, text_config=text, image_token_index=3, image_grid_pinpoints=pinpoints
        )
        model = LlavaNextForConditionalGeneration(config).eval()
        # An image 64 pixels wide and 32 high: two tiles without padding, so four lines of eight patches and a new line.
        ids = torch.tensor([[1, 9, 8, *[3] * (16 + 4 * (8 + 1)), 7, 6, 5]])
        return model, {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.rand(1, 3, 3, 32, 32),
            "image_sizes": torch.tensor([[32, 64]]),
        }
