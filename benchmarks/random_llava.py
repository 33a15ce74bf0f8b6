"""A checkpoint of LLaVA's architecture with about 100 million random weights, for measurements of speed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
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

SIDE, PATCH = 336, 14  # as in LLaVA-1.5, which gives 24 x 24 = 576 visual tokens
VOCABULARY = 32064  # number of rows of the embedding, as in LLaVA-1.5
# The vision tower has the depth of CLIP-L, but 7 heads of width 64. The language model is a Llama of 8 layers. The text
# tower is about as large in proportion to the vision tower as in CLIP-L.
VISION: dict[str, Any] = {
    "hidden_size": 448,
    "intermediate_size": 1792,
    "num_hidden_layers": 24,
    "num_attention_heads": 7,
}
LANGUAGE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
}
TEMPLATE = (
    "{% for m in messages %}USER: {% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def save(folder: Path, texts: Iterable[str], seed: int = 0) -> int:
    """Write the checkpoint, its processor, and a companion CLIP.

    Args:
        folder: folder to write to.
        texts: texts that the tokenizer, a byte-level BPE, is trained on.
        seed: seed of the weights.

    Returns:
        Number of parameters of the model, without the companion.
    """
    torch.manual_seed(seed)
    tokenizer = _tokenizer(texts)
    vision = CLIPVisionConfig(**VISION, image_size=SIDE, patch_size=PATCH, projection_dim=256)
    language = LlamaConfig(
        **LANGUAGE,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    image: Any = tokenizer.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=language, image_token_index=image, tie_word_embeddings=True)
    )
    model.save_pretrained(folder)
    square = {"height": SIDE, "width": SIDE}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    text = CLIPTextConfig(
        **TEXT, vocab_size=len(tokenizer), max_position_embeddings=77, eos_token_id=2, bos_token_id=1, pad_token_id=0
    )
    # The companion's own vision encoder is never run, so that one layer of it is enough.
    beside = CLIPVisionConfig(**{**VISION, "num_hidden_layers": 1}, image_size=SIDE, patch_size=PATCH)
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=beside.to_dict(), projection_dim=256)
    ).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    return sum(parameter.numel() for parameter in model.parameters())


def _tokenizer(texts: Iterable[str], size: int = 8000) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*texts, *(f" {letter}" for letter in "ABCDEFGH")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )
