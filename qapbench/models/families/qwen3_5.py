"""Qwen3.5: the tower of Qwen3-VL without DeepStack, and a decoder of which most layers have linear attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qapbench.models.family import TINY_TEXT, family
from qapbench.models.qwen import QwenFamily
from qapbench.models.tower import MIDDLE, SHALLOW, at_depth


@family("qwen3_5")
class Qwen35(QwenFamily):
    """See `QwenFamily`. Every block of the tower sees the whole image.

    Layers with linear attention keep no keys of single tokens, so pruners inside the decoder are refused.
    """

    processor_class = "Qwen3VLProcessor"

    @property
    def attending(self) -> Mapping[str, int]:
        """The last block, and those at the relative depths at which CLIP's layers are read."""
        every = range(len(self.model.model.visual.blocks))
        return {"full": every[-1], "middle": at_depth(every, MIDDLE), "shallow": at_depth(every, SHALLOW)}

    @property
    def merging(self) -> nn.Module:
        """The merger's first linear."""
        return self.model.model.visual.merger.linear_fc1

    def project(self, patches: Tensor) -> Tensor:
        """Apply the merger's MLP to normalised patches side by side [B, M, C]: [B, M, D]."""
        merger = self.model.model.visual.merger
        return merger.linear_fc2(merger.act_fn(merger.linear_fc1(patches)))

    @classmethod
    def tiny(cls) -> tuple[Any, dict[str, Any]]:
        """A random vision tower and hybrid decoder, and one prompt with an image of 8 x 10 patches."""
        from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

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
        }
        rope = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 1],
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.5,
        }
        text = {
            **TINY_TEXT,
            "head_dim": 12,
            "rope_parameters": rope,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 4,
        }
        config = Qwen3_5Config(
            vision_config=vision,
            text_config=text,
            image_token_id=3,
            video_token_id=4,
            vision_start_token_id=5,
            vision_end_token_id=6,
        )
        model = Qwen3_5ForConditionalGeneration(config).eval()
        ids = torch.tensor([[1, 9, 5, *[3] * 20, 6, 8, 7]])  # 8 x 10 patches, which are 4 x 5 tokens
        return model, {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == 3).long(),
            "pixel_values": torch.rand(80, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 8, 10]]),
        }
