"""Qwen3-VL: Qwen2.5-VL without windows, and with features of earlier tower blocks for early decoder layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qapbench.models.family import family
from qapbench.models.layers import DecoderLayers
from qapbench.models.qwen import Qwen3Family


@family("qwen3_vl")
class Qwen3VL(Qwen3Family):
    """See `Qwen3Family`.

    DeepStack (arXiv 2406.04334): the output of S earlier blocks goes through a merger each, and is added to the visual
    tokens behind the first S decoder layers. What the language model gets of a token is thus its feature and S more
    side by side, [D + S * D], which are cut by one index. A merged token has the S more of the place where it stands.
    """

    def roots(self, part: str) -> list[nn.Module]:
        """The mergers of DeepStack are projectors too."""
        more = self.model.model.visual.deepstack_merger_list if part == "projector" else ()
        return [*super().roots(part), *more]

    @property
    def decoder(self) -> DecoderLayers:
        """The language model's layers; behind the first ones, DeepStack adds to the columns of the whole prompt."""
        visual = self.model.model.visual
        return DecoderLayers(self.parts["language"], added_behind=len(visual.deepstack_merger_list))

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

        vision = {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2]}
        rope = {"mrope_interleaved": True}
        return cls.made(Qwen3VLConfig, Qwen3VLForConditionalGeneration, vision, {"head_dim": 12}, rope)
