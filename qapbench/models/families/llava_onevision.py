"""LLaVA-OneVision: a SigLIP tower that sees the scaled-down whole image and its tiles.

The patches of an image with many tiles are shrunk (anyres_max_9).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qapbench.models.anyres import AnyResFamily
from qapbench.models.family import TINY_TEXT, TINY_TOWER, family

UNSHRUNK = "anyres_max_1000000"  # aspect ratio setting that allows more tiles than any image has, so nothing is shrunk


@family("llava_onevision")
class LlavaOneVision(AnyResFamily):
    """Like LLaVA-NeXT, but without a CLS token.

    If a prompt has several images, each of them is its scaled-down whole image and a new line, without tiles.
    """

    image_inputs = ("pixel_values", "image_sizes", "batch_num_images")
    processor_class = "LlavaOnevisionProcessor"

    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Pixels, image sizes and the number of images per prompt."""
        return {name: inputs.get(name) for name in self.image_inputs}

    def tiling(self, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of tiles of each image; (0, 0) for images that share a prompt."""
        from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape

        sizes, config = inputs["image_sizes"], self.model.config
        numbers = inputs.get("batch_num_images")
        numbers = [1] * len(sizes) if numbers is None else [int(n) for n in numbers]
        alone = [number == 1 for number in numbers for _ in range(number)]
        return [
            get_anyres_image_grid_shape(size, config.image_grid_pinpoints, self.vision.image_size) if one else (0, 0)
            for size, one in zip(sizes, alone, strict=True)
        ]

    def pack(self, tiles: Tensor, size: Tensor, newline: Tensor, shrink: bool = True) -> Tensor:
        """Join tiles as the model does; see `AnyResFamily.pack`.

        Patches are resampled as `vision_aspect_ratio` says, unless `shrink` is False.
        """
        ratio = self.model.config.vision_aspect_ratio if shrink else UNSHRUNK
        return self.model.model.pack_image_features([tiles], size[None], newline, ratio)[0][0]

    @classmethod
    def tiny(cls) -> tuple[Any, dict[str, Any]]:
        """A random SigLIP and Qwen2, and one prompt with an image of two tiles."""
        from transformers import (
            LlavaOnevisionConfig,
            LlavaOnevisionForConditionalGeneration,
            Qwen2Config,
            SiglipVisionConfig,
        )

        vision, text = SiglipVisionConfig(**TINY_TOWER, vision_use_head=False), Qwen2Config(**TINY_TEXT)
        config = LlavaOnevisionConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=3,
            video_token_index=4,
            image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
            vision_feature_layer=-1,
        )
        model = LlavaOnevisionForConditionalGeneration(config).eval()
        # An image 64 pixels wide and 32 high: two tiles without padding, so four lines of eight patches and a new line.
        ids = torch.tensor([[1, 9, 8, *[3] * (16 + 4 * (8 + 1)), 7, 6, 5]])
        return model, {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.rand(1, 3, 3, 32, 32),
            "image_sizes": torch.tensor([[32, 64]]),
            "batch_num_images": torch.tensor([1]),
        }
