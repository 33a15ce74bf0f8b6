"""Checkpoints of random weights: a LLaVA of about 100 million for speed, or one with the shape of a published model.

    python -m benchmarks.random_llava --like llava-1.5-7b --out DIR [--dtype bfloat16] [--seed 0] [--no-text-tower]

The second kind has the published model's config, names of weights, shards and index, a processor, a tokenizer of the
same kind and size, and its CLIP text tower in `clip/`. Weights are made and written one tensor at a time, so that even
13 billion parameters need little memory; the disk must hold them.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForImageTextToText,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from qapbench.memory import peak_resident_bytes
from qapbench.models.family import images_only
from qapbench.models.relevance import BESIDE
from qapbench.spec.task_spec import TaskSpec
from qapbench.tasking.tasks import load_task

from . import made_tokenizers, streamed
from .true_shapes import SHAPES, Shape

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


def save_like(
    folder: Path,
    shape: Shape,
    texts: Iterable[str],
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    text_tower: bool = True,
    shard: int = streamed.SHARD,
) -> int:
    """Write a checkpoint of random weights in the shape of a published one. It is there whole or not at all.

    Args:
        folder: folder to write to, which must be new or empty.
        shape: the shape, of `SHAPES`.
        texts: texts that the tokenizers are trained on.
        dtype: dtype of the weights.
        seed: seed of the weights.
        text_tower: whether the CLIP that the vision tower belongs to is written too, to `clip/`.
        shard: largest size of a file in bytes.

    Returns:
        Bytes of the model's weights, without the text tower.
    """
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    texts = list(texts)
    config = shape.config()
    config.dtype = str(dtype).removeprefix("torch.")
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(draft)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(draft)
    weights = {shape.published(name): list(weight.shape) for name, weight in model.state_dict().items()}
    total = streamed.write(draft, dict(sorted(weights.items())), dtype, seed, shard)
    _processor(shape, texts).save_pretrained(draft)
    if text_tower and shape.clip_text is not None:
        beside = CLIPConfig(
            text_config=dict(shape.clip_text),
            vision_config=dict(shape.vision),
            projection_dim=shape.clip_text["projection_dim"],
            architectures=["CLIPModel"],
            dtype=config.dtype,
        )
        with torch.device("meta"):
            clip: Any = CLIPModel(beside)
        beside.save_pretrained(draft / BESIDE)
        shapes = {name: list(weight.shape) for name, weight in clip.state_dict().items()}
        streamed.write(draft / BESIDE, dict(sorted(shapes.items())), dtype, seed)
        made_tokenizers.clip(texts, shape.clip_text["vocab_size"]).save_pretrained(draft / BESIDE)
    if folder.is_dir():
        folder.rmdir()  # it is empty, or this fails
    draft.rename(folder)
    return total


def _processor(shape: Shape, texts: Iterable[str]) -> Any:
    """A processor like the published one, with a tokenizer of its size."""
    if shape.family == "qwen2_5_vl":
        patch, merge = shape.vision["patch_size"], shape.vision["spatial_merge_size"]
        side = patch * merge
        return images_only("Qwen2_5_VLProcessor")(
            image_processor=Qwen2VLImageProcessorPil(
                patch_size=patch, merge_size=merge, size={"shortest_edge": 4 * side**2, "longest_edge": 16384 * side**2}
            ),
            tokenizer=made_tokenizers.qwen(texts, shape.words, shape.special),
            chat_template=TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>"),
        )
    side = shape.vision["image_size"]
    square, edge = {"height": side, "width": side}, {"shortest_edge": side}
    common = {
        "tokenizer": made_tokenizers.llama(texts, shape.words, shape.special),
        "patch_size": shape.vision["patch_size"],
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": TEMPLATE,
    }
    if shape.family == "llava":
        return LlavaProcessor(image_processor=CLIPImageProcessorPil(size=edge, crop_size=square), **common)
    pinpoints = shape.config().image_grid_pinpoints
    images = LlavaNextImageProcessorPil(size=edge, crop_size=square, image_grid_pinpoints=pinpoints)
    return images_only("LlavaNextProcessor")(image_processor=images, **common)


def main() -> None:
    """Write the checkpoint that the command line asks for."""
    parser = argparse.ArgumentParser(description="Write a checkpoint of random weights in a published shape.")
    parser.add_argument("--like", required=True, choices=list(SHAPES))
    parser.add_argument("--out", required=True, type=Path, help="folder to write to; new or empty")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--no-text-tower", action="store_true", help="leave the CLIP in `clip/` out")
    asked = parser.parse_args()
    if asked.out.exists() and (not asked.out.is_dir() or any(asked.out.iterdir())):
        parser.error(f"--out: {asked.out} is there already and not an empty folder")
    shape, dtype = SHAPES[asked.like], getattr(torch, asked.dtype)
    with torch.device("meta"):
        needed = sum(w.numel() for w in AutoModelForImageTextToText.from_config(shape.config()).parameters())
    needed *= dtype.itemsize
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(asked.out.parent).free
    if needed + 2 * 10**9 > free:
        parser.error(f"--out: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
    began = time.perf_counter()
    docs = load_task(TaskSpec(name="diagramqa")).docs
    texts = (doc["text"] for doc in docs)
    total = save_like(asked.out, shape, texts, dtype, asked.seed, not asked.no_text_tower)
    peak = peak_resident_bytes() / 1e9
    seconds = time.perf_counter() - began
    print(f"{asked.out}: {total / 1e9:.2f} GB of weights in {seconds:.0f} s, with {peak:.2f} GB of memory at most")


if __name__ == "__main__":
    main()
