"""Checkpoints of random weights in published shapes: their layout, and that a run can be made with them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoTokenizer

from benchmarks import random_llava, streamed
from benchmarks.true_shapes import SHAPES, Shape
from qapbench.checkpoints.find import find_checkpoint
from qapbench.models import family_of
from qapbench.models.family import family_class
from qapbench.models.relevance import BESIDE, load_tower

TEXTS = [
    "Where does the red fox live? A. in the wood B. in the sea",
    "What is this? It is a diagram of a food chain.",
] * 4
TEXT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "image_size": 56, "projection_dim": 24}
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN = {"depth": 4, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 48}
# From the published `model.safetensors.index.json`: bytes of all weights in 16 bits, and some names.
PUBLISHED = {
    "llava-1.5-7b": (
        14126854144,
        (
            "language_model.lm_head.weight",
            "language_model.model.layers.31.mlp.down_proj.weight",
            "vision_tower.vision_model.pre_layrnorm.bias",
            "multi_modal_projector.linear_2.bias",
        ),
    ),
    "llava-1.5-13b": (26702989312, ("language_model.model.layers.39.self_attn.q_proj.weight",)),
    "llava-next-7b": (14126862336, ("image_newline", "language_model.model.embed_tokens.weight")),
    "qwen2.5-vl-7b": (16584333312, ("model.layers.27.self_attn.q_proj.bias", "visual.merger.mlp.2.weight")),
}


def tiny(name: str) -> Shape:
    """The shape with few and narrow layers, but names, vocabulary and layout as they are."""
    shape = SHAPES[name]
    text = {**shape.text, **TEXT, "num_key_value_heads": 2}
    if name.startswith("qwen"):
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}
        return dataclasses.replace(shape, text=text, vision={**shape.vision, **QWEN, "fullatt_block_indexes": [1, 3]})
    clip = {**(shape.clip_text or {}), **CLIP, "projection_dim": 24}
    return dataclasses.replace(
        shape, text=text, vision={**shape.vision, **TOWER, "num_hidden_layers": 3}, clip_text=clip
    )


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_shape_is_the_published_one(name: str) -> None:
    size, some = PUBLISHED[name]
    with torch.device("meta"):
        weights = AutoModelForImageTextToText.from_config(SHAPES[name].config()).state_dict()
    assert 2 * sum(weight.numel() for weight in weights.values()) == size
    assert set(some) <= {SHAPES[name].published(weight) for weight in weights}


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b"])
def test_a_checkpoint_is_sharded_and_loads_as_a_published_one_does(name: str, tmp_path: Path) -> None:
    folder, shape = tmp_path / name, tiny(name)
    random_llava.save_like(folder, shape, TEXTS, torch.bfloat16, shard=4 * 10**6)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(files)
    stored = 0
    for file in files:
        with safe_open(folder / file, "pt") as opened:
            assert set(opened.keys()) == {key for key, where in index["weight_map"].items() if where == file}
            stored += sum(opened.get_tensor(key).nbytes for key in opened.keys())  # noqa: SIM118
    assert stored == index["metadata"]["total_size"]
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == torch.bfloat16
    weight = model.model.language_model.layers[1].mlp.up_proj.weight.float()
    assert 0.9 * streamed.STD < float(weight.detach().std()) < 1.1 * streamed.STD
    processor = family_class(shape.family).load_processor(folder)
    family_of(model).complete(processor)
    assert processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id).endswith(("<image>", "image_pad|>"))
    text = "Where does the red fox live?"
    assert processor.tokenizer.decode(processor.tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_the_text_tower_is_that_of_clip(tmp_path: Path) -> None:
    shape = tiny("llava-1.5-7b")
    random_llava.save_like(tmp_path / "model", shape, TEXTS)
    folder = tmp_path / "model" / BESIDE
    assert find_checkpoint(str(folder)).folder == folder
    tower = load_tower(folder, shape.vision["hidden_size"], torch.device("cpu"))
    assert tower.embed_text("Where does the red fox live?").shape == (1, 1, 24)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the red fox").input_ids
    assert len(tokenizer) == 49408 and (ids[0], ids[-1]) == (49406, 49407)


def test_the_same_seed_writes_the_same_bytes_and_files_are_cut_where_they_must_be(tmp_path: Path) -> None:
    shapes = {"a.weight": [5, 7], "a.bias": [5], "norm.weight": [7], "scale": []}
    for name, seed in {"one": 0, "same": 0, "other": 1}.items():
        (tmp_path / name).mkdir()
        assert streamed.write(tmp_path / name, shapes, torch.float16, seed) == 2 * (35 + 5 + 7 + 1)
    one, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "same", "other"))
    assert one == same != other
    (tmp_path / "cut").mkdir()
    streamed.write(tmp_path / "cut", shapes, torch.float16, shard=80)
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as whole:
        for file in sorted((tmp_path / "cut").glob("*.safetensors")):
            with safe_open(file, "pt") as part:
                for key in part.keys():  # noqa: SIM118
                    assert torch.equal(part.get_tensor(key), whole.get_tensor(key))
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) == 2
