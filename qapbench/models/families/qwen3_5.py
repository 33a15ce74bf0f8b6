"""Qwen3.5: the tower of Qwen3-VL without DeepStack, and a decoder of which most layers have linear attention."""

from __future__ import annotations

from typing import Any

from qapbench.models.family import family
from qapbench.models.qwen import Qwen3Family

TINY_HYBRID = {
    "head_dim": 12,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
"""Keywords of a decoder's config that make it a small one of Qwen3.5's kind."""


@family("qwen3_5")
class Qwen35(Qwen3Family):
    """See `Qwen3Family`.

    Three of four layers have linear attention. A pruner inside the decoder can drop tokens in front of any of them,
    and their states go on from those that are left; what a pruner reads, and what counts the tokens of the KV cache,
    is in the layers with full attention.
    """

    @classmethod
    def tiny(cls) -> tuple[Any, dict[str, Any]]:
        """A random vision tower and hybrid decoder, and one prompt with an image of 8 x 10 patches."""
        from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

        rope = {"mrope_section": [1, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.5}
        vision = {"num_position_embeddings": 36}
        return cls.made(Qwen3_5Config, Qwen3_5ForConditionalGeneration, vision, TINY_HYBRID, rope)
