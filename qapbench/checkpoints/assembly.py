"""Assembly of embedded models on first use, from a language model in another Python package and parts trained for it.

A folder in `models/embedded` that holds an `assembly.json` in place of a `config.json` describes such a model. The
result is an ordinary checkpoint folder in the user's cache folder. Its name contains a hash
of everything it was made from, and its files are checked against a manifest of hashes when a process first uses it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from qapbench.errors import Problem, UserError
from qapbench.hashing import digest_file
from qapbench.progress import ProgressCallback

from .gguf import LlamaGGUF, read_llama
from .made import made

RECIPE = "assembly.json"
# Trained files that a recipe's folder must hold.
PARTS = (
    "clip/config.json",
    "clip/model.safetensors",
    "projector.safetensors",
    "lora/adapter_config.json",
    "lora/adapter_model.safetensors",
)
CARRIED = ("status.txt", "README.md")  # files that are copied into the result if they exist
VERSION = 1  # version of what `build` writes; increasing it leaves older cache folders unused
IMAGE = "<image>"


class Base(BaseModel):
    """The language model: a Llama in a GGUF file inside a Python package, which is never imported.

    Attributes:
        package: name of the package.
        file: path of the file in the package's folder.
        sha256: the file's SHA-256.
        extra: extra of qapbench that installs the package.
        install: command that installs it without a C++ compiler.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    package: str
    file: str
    sha256: str
    extra: str
    install: str


class Recipe(BaseModel):
    """Content of an `assembly.json`.

    Attributes:
        base: the language model.
        made_by: command that trains the other parts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Base
    made_by: str


def assemble(parts: Path, field: str = "model") -> Path:
    """Assemble the model of a recipe, unless an intact result is in the cache.

    Args:
        parts: the recipe's folder, with the trained parts.
        field: field of the spec that names the model, for messages.

    Returns:
        The checkpoint folder.

    Raises:
        UserError: trained parts are missing, the language model's package is not installed, or its file has another
            hash.
    """
    recipe = Recipe.model_validate_json((parts / RECIPE).read_text(encoding="utf-8"))
    name = parts.name
    if missing := [part for part in PARTS if not (parts / part).is_file()]:
        raise UserError(
            Problem(
                f"'{name}' has no trained parts yet ({missing[0]} ...); this makes them: {recipe.made_by}", (field,)
            )
        )

    def write(out: Path, report: ProgressCallback) -> None:
        build(parts, base_file(recipe.base, name, field), out, report)

    return made(name, _key(parts, recipe), write)


def _key(parts: Path, recipe: Recipe) -> str:
    """Hash of everything that the result is made from: VERSION, the language model, and the recipe's folder."""
    total = hashlib.sha256(f"{VERSION} {recipe.base.sha256}".encode())
    for file in sorted(path for path in parts.rglob("*") if path.is_file()):
        total.update(f"\0{file.relative_to(parts).as_posix()} {digest_file(file)}".encode())
    return total.hexdigest()[:16]


def base_file(base: Base, name: str, field: str) -> Path:
    """Locate the language model's file inside its package, without importing the package.

    Args:
        base: the language model.
        name: name of the embedded model, for messages.
        field: field of the spec that names the model, for messages.

    Raises:
        UserError: the package or a library that reads the file is not installed, or the file has another hash than the
            one that the parts were trained with.
    """
    found = importlib.util.find_spec(base.package)
    folders = [Path(place) for place in (found.submodule_search_locations or [])] if found else []
    file = next((folder / base.file for folder in folders if (folder / base.file).is_file()), None)
    absent = [module for module in ("gguf", "peft") if importlib.util.find_spec(module) is None]
    if file is None or absent:
        lacking = ", ".join([*([base.package] if file is None else []), *absent])
        message = (
            f"'{name}' needs {lacking}: pip install 'qapbench[{base.extra}]' (without a C++ compiler: {base.install})"
        )
        raise UserError(Problem(message, (field,)))
    if (digest := digest_file(file)) != base.sha256:
        raise UserError(
            Problem(f"{file} has SHA-256 {digest[:12]}..., not {base.sha256[:12]}...; {base.install}", (field,))
        )
    return file


def build(parts: Path, base: Path, out: Path, report: ProgressCallback | None = None) -> None:
    """Write the checkpoint folder.

    The language model is dequantized, the LoRA is merged into it, vision tower and projector are added, and the result
    is saved in bfloat16.

    Args:
        parts: folder with `clip/` (the companion CLIP, whose vision model is the vision tower), `projector.safetensors`
            and `lora/`.
        base: the language model's GGUF file.
        out: an existing empty folder.
        report: told about progress; None for nobody.
    """
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import CLIPModel

    steps = 3

    def step(done: int, total: int) -> None:
        if report:
            report(parts.name, done, total + steps)

    llama = read_llama(base, step, (IMAGE,))
    tensors = len(llama.weights)
    step(tensors, tensors)
    clip: Any = CLIPModel.from_pretrained(parts / "clip", dtype=torch.float32, use_safetensors=True)
    model, processor = join(llama, clip.vision_model)
    model.model.multi_modal_projector.load_state_dict(load_file(parts / "projector.safetensors"))
    adapted: Any = PeftModel.from_pretrained(model.model.language_model, parts / "lora")
    model.model.language_model = adapted.merge_and_unload()
    step(tensors + 1, tensors)
    model.to(torch.bfloat16).save_pretrained(out)
    processor.save_pretrained(out)
    step(tensors + 2, tensors)
    shutil.copytree(parts / "clip", out / "clip")
    for name in CARRIED:
        if (parts / name).is_file():
            shutil.copyfile(parts / name, out / name)
    step(tensors + 3, tensors)


def join(llama: LlamaGGUF, tower: nn.Module) -> tuple[Any, Any]:
    """Join a language model and a vision tower to a LLaVA with a freshly initialised projector.

    Args:
        llama: the language model, whose tokenizer has the added token `<image>`.
        tower: a `CLIPVisionModel`, used without a copy.

    Returns:
        (`LlavaForConditionalGeneration` in float32, its processor).
    """
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.initialization import no_init_weights
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vision: Any = tower.config
    ids = {key: getattr(llama.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    weights = {**llama.weights, "model.embed_tokens.weight": _widened(llama, "model.embed_tokens.weight")}
    if "lm_head.weight" in weights:
        weights["lm_head.weight"] = _widened(llama, "lm_head.weight")
    vocabulary = len(weights["model.embed_tokens.weight"])
    side = vision.image_size // vision.patch_size
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig.from_dict({**llama.config.to_dict(), "vocab_size": vocabulary}),
        image_token_index=llama.tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=side * side,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=llama.config.tie_word_embeddings,
        **ids,
    )
    with no_init_weights():
        model: Any = LlavaForConditionalGeneration(config)
    core = {key.removeprefix("model."): weight for key, weight in weights.items() if key.startswith("model.")}
    model.model.language_model.load_state_dict(core, assign=True)
    if "lm_head.weight" in weights:
        model.lm_head.weight = nn.Parameter(weights["lm_head.weight"])
    model.tie_weights()
    model.model.vision_tower = tower
    for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        linear.reset_parameters()
    model.generation_config.update(**ids, do_sample=False)
    edge = {"height": vision.image_size, "width": vision.image_size}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": vision.image_size}, crop_size=edge),
        tokenizer=llama.tokenizer,
        patch_size=vision.patch_size,
        chat_template=with_images(llama.chat_template),
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return model.eval(), processor


def _widened(llama: LlamaGGUF, name: str) -> Tensor:
    """The weight `name` with rows for added tokens, up to a multiple of 64: [V', D].

    Each added row is the mean of the others. As a row of the head it therefore scores the mean logit, which is never
    the largest.
    """
    weight = llama.weights[name]
    rows = -(-len(llama.tokenizer) // 64) * 64 - len(weight)
    return torch.cat([weight, weight.mean(0, keepdim=True).expand(max(0, rows), -1)])


def with_images(template: str) -> str:
    """Extend a chat template for string contents to contents that are lists of items.

    Of a list, the images come first, one per line, and then the text. Strings are rendered as before.

    Raises:
        ValueError: the template never reads a message's content in the expected way.
    """
    content = "message['content']"
    if content not in template:
        raise ValueError(f"the chat template never reads {content}")
    macro = (
        "{% macro body(content) %}{% if content is string %}{{ content }}{% else %}"
        "{% for item in content if item['type'] == 'image' %}{{ '" + IMAGE + "\\n' }}{% endfor %}"
        "{% for item in content if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}"
        "{% endif %}{% endmacro %}"
    )
    return macro + template.replace(content, f"body({content})")
