"""One small random checkpoint of each family in its real folder layout."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from llava_checkpoints import make_tokenizer
from PIL import Image
from transformers import GotOcr2ImageProcessorPil, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from qapbench.models.families.minicpmv4_6 import processor_class
from qapbench.models.family import families, images_only

TILE = {"height": 32, "width": 32}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
PICTURE = {
    "gemma3": "<start_of_image>",
    "internvl": "<IMG_CONTEXT>",
    "minicpmv4_6": "<|image_pad|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_5": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
}
SIZES = [(64, 32), (30, 60), (50, 34), (32, 32)]  # width, height: two tiles, padding, four tiles, ...


def template(image: str) -> str:
    return (
        "{% for m in messages %}USER: {% for c in m['content'] if c['type'] == 'image' %}" + image + "\n{% endfor %}"
        "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %} {% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


def tokenizer_with(**special: str) -> Any:
    """The tests' tokenizer with named special tokens of a family's own."""
    return PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer()._tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens=special,
        clean_up_tokenization_spaces=False,
    )


def spread(name: str, std: float) -> tuple[Any, dict[str, Any]]:
    """The family's tiny model with matrices of this spread, whose tokens differ more, and its prompt."""
    torch.manual_seed(0)
    model, inputs = families.create(name).tiny()
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=std)
    return model, inputs


def save_family(name: str, folder: Path, seed: int = 0, **config: Any) -> Path:
    """The family's tiny model with a vocabulary of its own, and its processor."""
    torch.manual_seed(seed)
    tiny, _ = families.create(name).tiny()
    processor = PROCESSORS[name](tiny.config)
    tokenizer = processor.tokenizer
    tiny.config.text_config.vocab_size = len(tokenizer)
    tiny.config.text_config.initializer_range = 0.15
    # Gemma's processor gives the token that a text has for an image, and not the one that stands for a visual token.
    tiny.config.image_token_id = getattr(tokenizer, "image_token_id", None) or processor.image_token_id
    for key, value in config.items():
        setattr(tiny.config, key, value)
    model = type(tiny)(tiny.config)
    for weight in model.parameters():
        if weight.ndim == 2 and not weight.any():  # Gemma's projector begins as zeros
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _llava_next(config: Any) -> Any:
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 32}, crop_size=TILE, image_grid_pinpoints=PINPOINTS)
    return images_only("LlavaNextProcessor")(
        image_processor=images,
        tokenizer=make_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )


def _llava_onevision(config: Any) -> Any:
    images = LlavaOnevisionImageProcessorPil(size=TILE, image_grid_pinpoints=PINPOINTS)
    return images_only("LlavaOnevisionProcessor")(
        image_processor=images,
        tokenizer=make_tokenizer(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )


def _qwen(config: Any, processor: str = "Qwen2_5_VLProcessor") -> Any:
    tokenizer = tokenizer_with(
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 64 * 64}
    )
    config.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    config.vision_start_token_id = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    config.vision_end_token_id = tokenizer.convert_tokens_to_ids("<|vision_end|>")
    return images_only(processor)(
        image_processor=images, tokenizer=tokenizer, chat_template=template(PICTURE["qwen2_5_vl"])
    )


def _internvl(config: Any) -> Any:
    tokenizer = tokenizer_with(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    images = GotOcr2ImageProcessorPil(size=TILE, crop_to_patches=True, max_patches=4)
    return images_only("InternVLProcessor")(
        image_processor=images, tokenizer=tokenizer, image_seq_length=16, chat_template=template("<IMG_CONTEXT>")
    )


def _idefics3(config: Any) -> Any:
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    places = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return transformers.Idefics3Processor(
        image_processor=images,
        tokenizer=tokenizer_with(**{f"mark_{at}": mark for at, mark in enumerate((*marks, *places))}),
        image_seq_len=16,
        chat_template=template("<image>"),
    )


def _gemma3(config: Any) -> Any:
    tokenizer = tokenizer_with(
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
    )
    return transformers.Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size=TILE),
        tokenizer=tokenizer,
        image_seq_length=16,
        chat_template=template("<start_of_image>"),
    )


def _minicpmv(config: Any) -> Any:
    marks = {f"{name}_start_token": f"<{name}>" for name in ("image", "slice", "image_id")}
    marks |= {f"{name}_end_token": f"</{name}>" for name in ("image", "slice", "image_id")}
    tokenizer = tokenizer_with(image_token="<|image_pad|>", video_token="<|video_pad|>", **marks)
    images = MiniCPMV4_6ImageProcessorPil(scale_resolution=32, patch_size=2, max_slice_nums=4)
    return processor_class()(
        image_processor=images, tokenizer=tokenizer, chat_template=template(PICTURE["minicpmv4_6"])
    )


PROCESSORS: dict[str, Callable[[Any], Any]] = {
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
    "llava_next": _llava_next,
    "minicpmv4_6": _minicpmv,
    "llava_onevision": _llava_onevision,
    "qwen2_5_vl": _qwen,
    "qwen3_5": functools.partial(_qwen, processor="Qwen3VLProcessor"),
    "qwen3_vl": functools.partial(_qwen, processor="Qwen3VLProcessor"),
    "internvl": _internvl,
}


def picture_of(size: tuple[int, int], seed: int) -> Image.Image:
    """Width and height, as PIL has them."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)
