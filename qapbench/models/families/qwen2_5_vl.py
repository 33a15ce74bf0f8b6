"""Qwen2.5-VL: images at their own resolution, window attention, a merger of 2 x 2 patches, M-RoPE positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qapbench.models.family import TINY_TEXT, family
from qapbench.models.qwen import QwenFamily
from qapbench.models.tower import MIDDLE


@family("qwen2_5_vl")
class Qwen25VL(QwenFamily):
    """See `QwenFamily`. In most blocks attention stays within a window of the image.

    Attention is that of the last block with full attention, for `middle_attention_received` that of the block with full
    attention nearest to the middle, and for `shallow_cls_attention` that of the first block with full attention.
    """

    processor_class = "Qwen2_5_VLProcessor"

    @property
    def attending(self) -> Mapping[str, int]:
        """The blocks with full attention; see `QwenFamily.attending`."""
        visual = self.model.model.visual
        full = sorted(set(visual.fullatt_block_indexes) & set(range(len(visual.blocks))))
        if not full:
            return {}
        middle = max(round(len(visual.blocks) * MIDDLE), 1) - 1
        nearest = min(full, key=lambda index: (abs(index - middle), index))
        return {"full": full[-1], "middle": nearest, "shallow": full[0]}

    @property
    def merging(self) -> nn.Module:
        """The merger's MLP."""
        return self.model.model.visual.merger.mlp

    def attended(self, grids: Tensor) -> list[Sequence[int]]:
        """Blocks without full attention attend within windows; see `QwenFamily.attended`."""
        from transformers.vision_utils import get_vision_window_index

        visual = self.model.model.visual
        bounds = get_vision_window_index(grids, self._merge, visual.window_size, visual.patch_size)[1]
        windows = [int(size) for size in bounds.diff() if size]
        every = super().attended(grids)
        return [whole if at in visual.fullatt_block_indexes else windows for at, whole in enumerate(every)]

    def project(self, patches: Tensor) -> Tensor:
        """Apply the merger's MLP to normalised patches side by side [B, M, C]: [B, M, D]."""
        return self.merging(patches)

    def raster(self, grids: Tensor) -> Tensor:
        """The tower orders patches by window; see `QwenFamily.raster`."""
        from transformers.vision_utils import get_vision_window_index

        visual = self.model.model.visual
        return get_vision_window_index(grids, self._merge, visual.window_size, visual.patch_size)[0].argsort()

    @classmethod
    def tiny(cls) -> tuple[Any, dict[str, Any]]:
        """A random vision tower and Qwen2.5, and one prompt with an image of 8 x 10 patches."""
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        vision = {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 48,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1, 3],
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
        }
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
        text = {**TINY_TEXT, "rope_parameters": rope}
        config = Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=3,
            video_token_id=4,
            vision_start_token_id=5,
            vision_end_token_id=6,
        )
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
        ids = torch.tensor([[1, 9, 5, *[3] * 20, 6, 8, 7]])  # 8 x 10 patches, which are 4 x 5 tokens
        return model, {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == 3).long(),
            "pixel_values": torch.rand(80, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 8, 10]]),
        }
