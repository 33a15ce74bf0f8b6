"""Tokenizers of the same kind and size as those of published models, trained on the texts at hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

TRAINED = 8000  # tokens that are learnt; the others are names that no text has, since there is not enough text
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def llama(texts: Iterable[str], words: int, special: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer like Llama's: BPE on words with a mark for spaces, and a token for each byte to fall back on.

    Args:
        texts: what it is trained on.
        words: number of tokens in front of the special ones.
        special: the placeholder of an image and the token for padding, whose ids follow.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    first = ["<unk>", "<s>", "</s>", *BYTES]
    vocabulary, merges = _trained(tokenizer, texts, words, first)
    tokenizer.model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (*first[:3], *special)])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token=special[1],
        padding_side="left",
        extra_special_tokens={"image_token": special[0]},
        clean_up_tokenization_spaces=False,
    )


def qwen(texts: Iterable[str], words: int, special: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer like Qwen's: byte-level BPE with the special tokens behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary, merges = _trained(tokenizer, texts, words, [])
    tokenizer.model = models.BPE(vocabulary, merges)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens={
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
        },
        clean_up_tokenization_spaces=False,
    )


def clip(texts: Iterable[str], size: int) -> Any:
    """A tokenizer like CLIP's, with `size` tokens, of which the last two begin and end a text."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lower = (text.lower() for text in texts)
    vocabulary, merges = _trained(tokenizer, lower, size - 2, [], end_of_word_suffix="</w>")
    vocabulary |= {"<|startoftext|>": size - 2, "<|endoftext|>": size - 1}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def _trained(
    tokenizer: Tokenizer, texts: Iterable[str], size: int, first: Sequence[str], **options: Any
) -> tuple[dict[str, int], list[Any]]:
    """Train a BPE, and fill its vocabulary up to the size with tokens that no text has.

    Returns:
        (vocabulary, merges).
    """
    trainer = trainers.BpeTrainer(
        vocab_size=min(TRAINED, size),
        special_tokens=list(first),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        **options,
    )
    tokenizer.train_from_iterator([*texts, *(f" {letter}" for letter in "ABCDEFGH")], trainer)
    learnt = json.loads(tokenizer.to_str())["model"]
    vocabulary: dict[str, int] = learnt["vocab"]
    for index in range(len(vocabulary), size):
        vocabulary[f"<unused {index}>"] = index
    return vocabulary, [tuple(merge) for merge in learnt["merges"]]
