"""Llama checkpoints in GGUF files, read as weights, config, tokenizer and chat template of transformers.

transformers can read GGUF too (`gguf_file=`), but it initialises a whole model first, and its tokenizer for SmolLM2
joins digits. Here each tensor is dequantized once, by the `gguf` package. The tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qapbench.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import LlamaConfig

# Names of tensors outside the blocks: GGUF -> transformers.
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Names of parts of a block: GGUF -> transformers.
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # type of special tokens in GGUF
DIGITS_ALONE = {"smollm": True, "gpt-2": False}
"""Supported byte-level BPE vocabularies (`tokenizer.ggml.pre`) -> whether every digit is a token of its own."""


@dataclass(frozen=True)
class LlamaGGUF:
    """Content of a GGUF file.

    Attributes:
        config: config of a `LlamaForCausalLM`.
        weights: its state dict in float32, without `lm_head.weight` if the embeddings are tied.
        tokenizer: a `PreTrainedTokenizerFast` without a chat template.
        chat_template: the file's chat template, for messages whose content is a string.
    """

    config: LlamaConfig
    weights: dict[str, Tensor]
    tokenizer: Any
    chat_template: str


def read_llama(file: Path, report: Callable[[int, int], None] | None = None, extra: tuple[str, ...] = ()) -> LlamaGGUF:
    """Read and dequantize a GGUF file.

    Args:
        file: the GGUF file.
        report: called with (tensors done, tensors in total).
        extra: special tokens to add after the file's own vocabulary, such as an image placeholder.

    Raises:
        UserError: the file holds no Llama, or its vocabulary is of an unknown kind.
    """
    from gguf import GGUFReader, dequantize
    from transformers import LlamaConfig

    reader = GGUFReader(file)
    fields = reader.fields

    def value(key: str, default: Any = None) -> Any:
        return fields[key].contents() if key in fields else default

    if value("general.architecture") != "llama":
        raise UserError(f"{file}: holds a model of architecture '{value('general.architecture')}', not llama")
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    config = LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"].data),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv", value("llama.attention.head_count")),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings=tied,
        bos_token_id=value("tokenizer.ggml.bos_token_id"),
        eos_token_id=value("tokenizer.ggml.eos_token_id"),
        pad_token_id=value("tokenizer.ggml.padding_token_id"),
    )
    heads = {"attn_q": config.num_attention_heads, "attn_k": int(config.num_key_value_heads or 0)}
    weights: dict[str, Tensor] = {}
    for done, tensor in enumerate(reader.tensors):
        if report:
            report(done, len(reader.tensors))
        name, part = _name_of(tensor.name, file)
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        weights[name] = _halves(weight, heads[part]) if part in heads else weight
    return LlamaGGUF(config, weights, _tokenizer(fields, value, extra, file), value("tokenizer.chat_template", ""))


def _name_of(name: str, file: Path) -> tuple[str, str]:
    """(name of a tensor in transformers, part of the block in GGUF or "")."""
    if name in WHOLE:
        return WHOLE[name], ""
    _, layer, part = [*name.removesuffix(".weight").split("."), "", ""][:3]
    if not name.startswith("blk.") or part not in BLOCK:
        raise UserError(f"{file}: tensor '{name}' has no place in a Llama")
    return f"model.layers.{layer}.{BLOCK[part]}.weight", part


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key projection from GGUF's order to that of transformers.

    In GGUF the two coordinates of each rotation are neighbours. transformers rotates the first half of a head against
    the second.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def _tokenizer(fields: Any, value: Callable[..., Any], extra: tuple[str, ...], file: Path) -> Any:
    """Build the tokenizer from the file's vocabulary, merges and special tokens, with `extra` special tokens added."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind = value("tokenizer.ggml.pre")
    if value("tokenizer.ggml.model") != "gpt2" or kind not in DIGITS_ALONE:
        raise UserError(f"{file}: unknown vocabulary '{kind}'; {nearest(str(kind), DIGITS_ALONE)}")
    tokens, merges = _texts(fields["tokenizer.ggml.tokens"]), _texts(fields["tokenizer.ggml.merges"])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [(first, second) for first, _, second in (merge.partition(" ") for merge in merges)]
    bpe = Tokenizer(models.BPE(vocabulary, pairs))
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if DIGITS_ALONE[kind] else []
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    types = value("tokenizer.ggml.token_type", [])
    special = [token for token, kind in zip(tokens, types, strict=False) if kind == CONTROL]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*special, *extra)])
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    named = {f"{role}_token": value(f"tokenizer.ggml.{key}_token_id") for role, key in roles.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=value("llama.context_length"),
        padding_side="left",
        **{role: tokens[i] for role, i in named.items() if i is not None},
        extra_special_tokens={f"{token.strip('<>')}_token": token for token in extra},
    )


def _texts(field: Any) -> list[str]:
    """The strings of an array. `contents()` would decode a hundred thousand of them one by one through numpy views."""
    return [field.parts[i].tobytes().decode("utf-8") for i in field.data]
