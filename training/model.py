"""Configuration, construction and export of `diagram-llava`, a small LLaVA-1.5, and of its companion CLIP.

The two models share one vision tower. `LlavaForConditionalGeneration` takes its hidden state -2 through a projector of
two layers. `CLIPModel` takes the same hidden state (for patches) and the last CLS token (for the whole image) through
`post_layernorm` and `visual_projection`, and compares them to the output of a small text tower.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
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

IMAGE_SIZE, PATCH = 96, 8
GRID = IMAGE_SIZE // PATCH
N_PATCHES = GRID * GRID
PATCHES_SEEN = 0.3  # a patch shows a thing that covers more than this share of it
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
# The id of </s> is not 2, because CLIPTextModel takes eos_token_id == 2 for a legacy config and then pools at the
# largest id.
PAD_ID, BOS_ID, IMAGE_ID, EOS_ID = 0, 1, 2, 3
CLIP_TEXT_LEN = 128
# The template of LLaVA-1.5 as published: images come first, then text, and there is no system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ':' }}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% if message['role'] != 'assistant' %}{{ ' ' }}{% endif %}"
    "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' }}{% endif %}{{ content['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def train_bpe(texts: Iterable[str], vocab_size: int = 2048) -> Tokenizer:
    """Train the tokenizer on texts. It is a byte-level BPE, so that it can encode any text."""
    tok = Tokenizer(models.BPE())
    # With add_prefix_space=False, "ASSISTANT: B" is split into "ASSISTANT", ":" and " B": a letter is one token.
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, IMAGE, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    return tok


def _wrap(tok: Tokenizer, single: str, **kwargs: Any) -> PreTrainedTokenizerFast:
    copy = Tokenizer.from_str(tok.to_str())
    copy.post_processor = processors.TemplateProcessing(single=single, special_tokens=[(BOS, BOS_ID), (EOS, EOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=copy,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **kwargs,
    )


def build_tokenizers(tok: Tokenizer) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """Build the tokenizers of the two models from one BPE.

    Returns:
        The decoder's tokenizer, which puts `<s>` in front and pads on the left, and that of CLIP, which also puts
        `</s>` at the end and pads on the right.
    """
    lm = _wrap(
        tok,
        f"{BOS} $A",
        padding_side="left",
        model_max_length=2048,
        extra_special_tokens={"image_token": IMAGE},
    )
    clip = _wrap(tok, f"{BOS} $A {EOS}", padding_side="right", model_max_length=CLIP_TEXT_LEN)
    return lm, clip


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Build the LLaVA processor. It scales the short edge to 96 pixels and crops to 96 x 96: squares stay complete."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        chat_template=CHAT_TEMPLATE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_configs(vocab_size: int) -> tuple[LlavaConfig, CLIPConfig]:
    """Build the configurations of LLaVA and CLIP, whose vision configurations are equal."""
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=5,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=128,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=False,
    )
    special: dict[str, Any] = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    llava = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_ID,
        image_seq_length=N_PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        **special,
    )
    clip_text = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CLIP_TEXT_LEN,
        projection_dim=128,
        hidden_act="gelu",
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    # The companion is trained to give patches that matter to a question a high similarity with it.
    fields: dict[str, Any] = {"text_config": clip_text.to_dict(), "vision_config": vision.to_dict()}
    fields["relevance_sign"] = "positive"
    clip = CLIPConfig(**fields, projection_dim=128)
    return llava, clip


def build_models(vocab_size: int) -> tuple[Any, Any]:
    """Build LLaVA and CLIP, untrained, in float32. CLIP's vision model is the same module as LLaVA's vision tower."""
    llava_cfg, clip_cfg = build_configs(vocab_size)
    llava = LlavaForConditionalGeneration(llava_cfg)
    clip = CLIPModel(clip_cfg)
    clip.vision_model = llava.model.vision_tower
    with torch.no_grad():
        for part in (llava.model, clip.text_model):
            for name, p in part.named_parameters():
                if p.ndim == 2 and "embed" not in name:
                    # The last layer of a residual branch starts small, all others at unit gain.
                    small = name.endswith(("out_proj.weight", "fc2.weight", "down_proj.weight"))
                    nn.init.normal_(p, 0, (0.2 if small else 1.0) / math.sqrt(p.shape[1]))
        emb: Any = llava.model.vision_tower.embeddings
        emb.patch_embedding.weight.normal_(0, 1.0 / math.sqrt(3 * PATCH * PATCH))
        emb.position_embedding.weight.normal_(0, 0.3)
        emb.class_embedding.normal_(0, 0.3)
        words = nn.init.normal_(llava.get_input_embeddings().weight, 0, 0.5)  # type: ignore[arg-type]
        # The head is not tied to the embeddings, but starts as a scaled copy of them, so that copying a token is half
        # learnt. Two more initial values help with that: keys resemble queries, so that a token attends to tokens like
        # itself, and output projections resemble transposed value projections, so that what is read is passed on.
        llava.lm_head.weight.copy_(words * 0.1)
        for layer in llava.model.language_model.layers:
            attention = layer.self_attn
            noise = torch.randn_like(attention.k_proj.weight) / math.sqrt(attention.k_proj.in_features)
            attention.k_proj.weight.copy_(0.8 * attention.q_proj.weight + 0.6 * noise)
            attention.o_proj.weight.copy_(0.3 * attention.v_proj.weight.T)
    return llava, clip


def export(
    llava: Any,
    clip: Any,
    bpe: Tokenizer,
    out: Path,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write the checkpoint folder of LLaVA and, below it, that of CLIP.

    Each file is moved into place by a rename, so that a reader sees either the old or the new file.

    Args:
        llava: the LLaVA model.
        clip: the companion CLIP.
        bpe: the tokenizer.
        out: folder to write to.
        dtype: type of the stored weights.
    """
    lm_tok, clip_tok = build_tokenizers(bpe)
    out.mkdir(parents=True, exist_ok=True)
    tmp = Path(tempfile.mkdtemp(dir=out.parent, prefix=".export-"))
    try:
        for model, tok, sub in ((llava, lm_tok, tmp), (clip, clip_tok, tmp / "clip")):
            cls: Any = type(model)
            config = type(model.config).from_dict(model.config.to_dict())
            with torch.device("meta"):
                copy = cls(config)
            copy = copy.to_empty(device="cpu").to(dtype)
            state = {k: v.detach().to("cpu", dtype) for k, v in model.state_dict().items()}
            missing = copy.load_state_dict(state, strict=False, assign=True)
            if missing.missing_keys or missing.unexpected_keys:
                raise RuntimeError(f"the export does not fit the model: {missing}")
            copy.config.dtype = dtype
            copy.save_pretrained(sub)
            if sub is tmp:
                build_processor(tok).save_pretrained(sub)
            else:
                tok.save_pretrained(sub)
        for path in sorted(p for p in tmp.rglob("*") if p.is_file()):
            target = out / path.relative_to(tmp)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o644)
            path.replace(target)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def parameter_counts(llava: Any, clip: Any) -> dict[str, int]:
    """Number of parameters of each part of the models."""

    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    return {
        "llava": count(llava),
        "vision_tower": count(llava.model.vision_tower),
        "projector": count(llava.model.multi_modal_projector),
        "decoder": count(llava.model.language_model) + count(llava.lm_head),
        "clip": count(clip),
        "clip_text": count(clip.text_model) + count(clip.text_projection),
    }
