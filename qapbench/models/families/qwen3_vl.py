"""Qwen3-VL: Qwen2.5-VL without windows, and with features of earlier tower blocks for early decoder layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qapbench.models.family import TINY_TEXT, family
from qapbench.models.layers import DecoderLayers
from qapbench.models.qwen import QwenFamily
from qapbench.models.tower import MIDDLE, SHALLOW, at_depth


@family("qwen3_vl")
class Qwen3VL(QwenFamily):
    """See `QwenFamily`. Every block sees the whole image.

    DeepStack (arXiv 2406.04334): the output of S earlier blocks goes through a merger each, and is added to the visual
    tokens behind the first S decoder layers. What the language model gets of a token is thus its feature and S more
    side by side, [D + S * D], which are cut by one index. A merged token has the S more of the place where it stands.
    """

    processor_class = "Qwen3VLProcessor"
    least_tokens = 64

    @property
    def attending(self) -> Mapping[str, int]:
        """The last block, and those at the relative depths at which CLIP's layers are read."""
        every = range(len(self.model.model.visual.blocks))
        return {"full": every[-1], "middle": at_depth(every, MIDDLE), "shallow": at_depth(every, SHALLOW)}

    @property
    def merging(self) -> nn.Module:
        """The merger's first linear."""
        return self.model.model.visual.merger.linear_fc1

    def roots(self, part: str) -> list[nn.Module]:
        """The mergers of DeepStack are projectors too."""
        more = self.model.model.visual.deepstack_merger_list if part == "projector" else ()
        return [*super().roots(part), *more]

    @property
    def decoder(self) -> DecoderLayers:
        """The language model's layers; behind the first ones, DeepStack adds to the columns of the whole prompt."""
        visual = self.model.model.visual
        return DecoderLayers(self.parts["language"], added_behind=len(visual.deepstack_merger_list))

    def project(self, patches: Tensor) -> Tensor:
        """Apply the merger's MLP to normalised patches side by side [B, M, C]: [B, M, D]."""
        merger = self.model.model.visual.merger
        return merger.linear_fc2(merger.act_fn(merger.linear_fc1(patches)))

    def handed(self, output: Any) -> list[Tensor]:
        """The feature of each token and those of DeepStack side by side, [N, (1 + S) * D] per image."""
        return [
            torch.cat(levels, dim=-1) for levels in zip(output.pooler_output, *output.deepstack_features, strict=True)
        ]

    def encoded(self, features: list[Tensor]) -> dict[str, Any]:
        """Keyword arguments that hand features [K, (1 + S) * D] of each image to the model in place of pixels."""
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        width = self.model.config.text_config.hidden_size
        first, *others = zip(*(one.split(width, dim=-1) for one in features), strict=True)
        # transformers annotates one tensor each, but its models put lists of tensors there.
        pooled: Any = list(first)
        deep: Any = [list(level) for level in others]
        output = BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=deep)
        return {"mm_encoder_outputs": {"image": output}}

    @classmethod
    def tiny(cls) -> tuple[Any, dict[str, Any]]:
        """A random vision tower and Qwen3, and one prompt with an image of 8 x 10 patches."""
        from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

        vision = {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 48,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0, 2],
        }
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2], "mrope_interleaved": True}
        config = Qwen3VLConfig(
            vision_config=vision,
            text_config={**TINY_TEXT, "head_dim": 12, "rope_parameters": rope},
            image_token_id=3,
            video_token_id=4,
            vision_start_token_id=5,
            vision_end_token_id=6,
        )
        model = Qwen3VLForConditionalGeneration(config).eval()
        ids = torch.tensor([[1, 9, 5, *[3] * 20, 6, 8, 7]])  # 8 x 10 patches, which are 4 x 5 tokens
        return model, {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == 3).long(),
            "pixel_values": torch.rand(80, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 8, 10]]),
        }
