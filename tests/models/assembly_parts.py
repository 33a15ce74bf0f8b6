"""A tiny Llama as GGUF inside a package, and random parts trained to go with it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, LlamaConfig, LlamaForCausalLM

WIDTH, LAYERS, HEADS, KV, HIDDEN = 96, 2, 3, 1, 160
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def vocabulary() -> tuple[list[str], list[str]]:
    """(tokens, merges) of a byte-level BPE: the special tokens, every byte, a few merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["Ġ t", "h e", "Ġt he", "1 2"]
    return [*SPECIAL, *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in merges)], merges


def tiny_llama(seed: int = 0) -> Any:
    """A random model with one key/value head for three query heads and large numbers in few places."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary()[0]),
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(model: Any, file: Path, **changed: Any) -> None:
    """The model as GGUF: matrices as Q4_1, embeddings as Q8_0, norms as float32, as SmolLM2's file has them."""
    import gguf
    from gguf import GGMLQuantizationType as Kind

    tokens, merges = vocabulary()
    writer = gguf.GGUFWriter(file, changed.get("architecture", "llama"))
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changed.get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(merges)
    for add, token in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{add}_token_id")(token)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        array = weight.numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", KV)):
            if part in name:  # GGUF has the two coordinates of a rotation side by side
                array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        kind = Kind.F32 if array.ndim == 1 else Kind.Q8_0 if "embed" in name else Kind.Q4_1
        data = np.ascontiguousarray(array) if kind == Kind.F32 else gguf.quants.quantize(array, kind)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_clip() -> Any:
    """A random CLIP for 32 x 32 pictures of 16 patches, with an eight-token vocabulary of text."""
    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = CLIPTextConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)).eval()


def write_parts(folder: Path) -> None:
    """Random trained parts: companion CLIP, projector, LoRA of rank 4 on every linear of the decoder."""
    from peft import LoraConfig, get_peft_model

    tiny_clip().save_pretrained(folder / "clip")
    torch.manual_seed(2)
    shapes = {
        "linear_1.weight": (WIDTH, 32),
        "linear_1.bias": (WIDTH,),
        "linear_2.weight": (WIDTH, WIDTH),
        "linear_2.bias": (WIDTH,),
    }
    save_file({name: torch.randn(shape) * 0.1 for name, shape in shapes.items()}, folder / "projector.safetensors")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(tiny_llama().model, config).save_pretrained(folder / "lora", save_embedding_layers=False)
