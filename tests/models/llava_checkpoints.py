"""Small random checkpoints in the real folder layout, loaded by `from_pretrained` like any user's."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SIDE, PATCH = 32, 8
TOKENS = (SIDE // PATCH) ** 2
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
WORDS = "USER: ASSISTANT: What is this? Where does the red fox live? A. B. C. cat dog tree Context: picture\n"
THREE = [
    "USER: <image>\nWhat is this? ASSISTANT:",
    "USER: Where does the red fox live? ASSISTANT:",
    "USER: <image>\nWhere does the red fox live? A. cat B. dog C. tree ASSISTANT:",
]


def make_tokenizer(image: bool = True) -> PreTrainedTokenizerFast:
    """A small byte-level BPE, with a placeholder for images or without."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<s>", "</s>", *(["<image>"] if image else [])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([WORDS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"} if image else {},
        clean_up_tokenization_spaces=False,
    )


def save_llava(folder: Path, seed: int = 0, layers: int = 2, width: int = 48) -> Path:
    """A LLaVA of some 100,000 random weights, with processor and tokenizer, as `save_pretrained` lays it out.

    The width of its language model is that of `width`, a multiple of 16.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=24,
    )
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.15,
    )
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_id, image_seq_length=TOKENS)
    model = LlavaForConditionalGeneration(config)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_clip(folder: Path, width: int = 32, seed: int = 1) -> Path:
    """A CLIP whose vision tower has the given width, with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = CLIPConfig(
        text_config=CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=20,
            eos_token_id=2,
            bos_token_id=1,
            pad_token_id=0,
        ).to_dict(),
        vision_config=CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
        ).to_dict(),
        projection_dim=24,
        relevance_sign="negative",
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def batch_of(processor: Any, texts: list[str], images: list[Image.Image]) -> dict[str, Any]:
    return dict(processor(text=texts, images=images or None, return_tensors="pt", padding=True))
