"""Qwen2.5-VL: images at their own resolution, window attention, a merger of 2 x 2 patches, M-RoPE positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from qapbench.models.family import family
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

        vision = {"window_size": 16, "fullatt_block_indexes": [1, 3]}
        return cls.made(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, vision, {}, {})
