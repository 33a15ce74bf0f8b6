"""Shapes of published checkpoints: their configs, the names of their weights, and what their tokenizer must hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# CLIP ViT-L/14 at 336 pixels, the tower of LLaVA 1.5 and 1.6, and the text tower that was trained with it.
CLIP_VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
CLIP_TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "vocab_size": 49408,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
LLAMA_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32064,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_13B = {**LLAMA_7B, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
LLAMA_13B |= {"num_attention_heads": 40, "num_key_value_heads": 40}
LLAMA_1B = {**LLAMA_7B, "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 16}
LLAMA_1B |= {"num_attention_heads": 16, "num_key_value_heads": 16}
QWEN_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-6,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "vocab_size": 152064,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
QWEN_VISION: dict[str, Any] = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
# Patterns of names in transformers -> names in the published files. The first pattern that matches applies.
LLAVA_NAMES = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.vision_tower\.(?:vision_model\.)?", "vision_tower.vision_model."),
    (r"^model\.", ""),
)
QWEN_NAMES = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))


@dataclass(frozen=True)
class Shape:
    """What a published checkpoint looks like.

    Attributes:
        family: its `model_type`: llava, llava_next or qwen2_5_vl.
        text: arguments of the language model's config.
        vision: arguments of the vision tower's config.
        clip_text: arguments of the config of the CLIP text tower that lies beside the model; None if it has none.
        words: number of tokens of the tokenizer in front of the special ones.
        special: special tokens behind them, by what they are for.
    """

    family: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any] = field(default_factory=lambda: CLIP_VISION)
    clip_text: Mapping[str, Any] | None = field(default_factory=lambda: CLIP_TEXT)
    words: int = 32000
    special: tuple[str, ...] = ("<image>", "<pad>")

    def config(self) -> Any:
        """The config of the whole model."""
        return _CONFIGS[self.family](self)

    def published(self, name: str) -> str:
        """Name in the published files of a weight that transformers calls `name`."""
        for pattern, new in QWEN_NAMES if self.family == "qwen2_5_vl" else LLAVA_NAMES:
            after, count = re.subn(pattern, new, name)
            if count:
                return after
        return name


def _llava(shape: Shape) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision: Any = CLIPVisionConfig(**shape.vision)
    config: Any = LlavaConfig
    return config(
        vision_config=vision,
        text_config=LlamaConfig(**{**shape.text, "pad_token_id": shape.words + 1}),
        image_token_index=shape.words,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        pad_token_id=shape.words + 1,
    )


def _llava_next(shape: Shape) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

    vision: Any = CLIPVisionConfig(**shape.vision)
    scale = vision.image_size / 336
    config: Any = LlavaNextConfig
    return config(
        vision_config=vision,
        text_config=LlamaConfig(**{**shape.text, "pad_token_id": shape.words + 1}),
        image_token_index=shape.words,
        image_grid_pinpoints=[[round(side * scale) for side in sides] for sides in PINPOINTS],
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        pad_token_id=shape.words + 1,
    )


def _qwen(shape: Shape) -> Any:
    from transformers import Qwen2_5_VLConfig

    at = {token: shape.words + index for index, token in enumerate(shape.special)}
    return Qwen2_5_VLConfig(
        vision_config=dict(shape.vision),
        text_config=dict(shape.text),
        image_token_id=at["<|image_pad|>"],
        video_token_id=at["<|video_pad|>"],
        vision_start_token_id=at["<|vision_start|>"],
        vision_end_token_id=at["<|vision_end|>"],
        tie_word_embeddings=False,
    )


_CONFIGS = {"llava": _llava, "llava_next": _llava_next, "qwen2_5_vl": _qwen}
QWEN_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
SHAPES: dict[str, Shape] = {
    "llava-1.3b": Shape("llava", LLAMA_1B),
    "llava-1.5-7b": Shape("llava", LLAMA_7B),
    "llava-1.5-13b": Shape("llava", LLAMA_13B),
    "llava-next-7b": Shape("llava_next", LLAMA_7B),
    "qwen2.5-vl-7b": Shape("qwen2_5_vl", QWEN_7B, QWEN_VISION, None, 151643, QWEN_SPECIAL),
}
"""The shapes of llava-hf/llava-1.5-7b-hf, llava-1.5-13b-hf, llava-v1.6-vicuna-7b-hf and Qwen/Qwen2.5-VL-7B-Instruct,
and of a LLaVA with 1.26 billion parameters, for which nothing is published."""
