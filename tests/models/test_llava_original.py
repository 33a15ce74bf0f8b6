"""LLaVA as its authors lay it out: the same numbers as the Hugging Face layout of the same weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llava_checkpoints import SIDE, make_tokenizer, picture, save_clip
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from benchmarks.cost import PROMPTS
from qapbench import RunSpec, UserError, compress, cost, pruners
from qapbench.models.loading import load_model
from qapbench.running.fingerprints import fingerprints
from qapbench.tasking.tasks import find_outline

pytestmark = pytest.mark.usefixtures("one_thread")
VERSIONS: dict[str, dict[str, Any]] = {
    "1.5": {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"},
    "1.3": {"model_type": "llava", "mm_use_im_start_end": True},
}
CPU = torch.device("cpu")


def save_original(folder: Path, version: str, **more: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """config.json, shards and tokenizer in one folder, CLIP in another; also the language model's own weights."""
    torch.manual_seed(3)
    tower = save_clip(folder / "openai-clip")
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        tower
    )
    tokenizer = make_tokenizer(image=False)
    plain = type(tokenizer)(
        tokenizer_object=tokenizer._tokenizer,
        unk_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<im_start>", "<im_end>"] if version == "1.3" else [],
    )
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(plain),
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float16",
        "mm_vision_tower": str(tower),
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        **VERSIONS[version],
        **more,
    }
    draw = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * 0.15

    weights = {"model.embed_tokens.weight": normal(len(plain), 48), "lm_head.weight": normal(len(plain), 48)}
    weights |= {"model.norm.weight": torch.ones(48)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        shapes = {"q_proj": (48, 48), "k_proj": (24, 48), "v_proj": (24, 48), "o_proj": (48, 48)}
        weights |= {f"{at}.self_attn.{name}.weight": normal(*shape) for name, shape in shapes.items()}
        shapes = {"gate_proj": (96, 48), "up_proj": (96, 48), "down_proj": (48, 96)}
        weights |= {f"{at}.mlp.{name}.weight": normal(*shape) for name, shape in shapes.items()}
        weights |= {f"{at}.{name}.weight": torch.ones(48) for name in ("input_layernorm", "post_attention_layernorm")}
        weights[f"{at}.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    if version == "1.3":
        weights |= {"model.mm_projector.weight": normal(48, 32), "model.mm_projector.bias": normal(48)}
    else:
        for at, width in ((0, 32), (2, 48)):
            weights |= {
                f"model.mm_projector.{at}.weight": normal(48, width),
                f"model.mm_projector.{at}.bias": normal(48),
            }
    model = folder / f"llava-v{version}"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    plain.save_pretrained(model)
    names = sorted(weights)
    for shard, part in enumerate((names[::2], names[1::2]), start=1):
        file = model / f"model-0000{shard}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, file, {"format": "pt"})
    return model, weights


def hugging_face(folder: Path, weights: dict[str, torch.Tensor]) -> Any:
    """The same weights put into transformers' classes by hand."""
    config = json.loads((folder / "config.json").read_text())
    vision = CLIPVisionModel.from_pretrained(config["mm_vision_tower"])
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    text = LlamaConfig(**{key: config[key] for key in keys}, vocab_size=config["vocab_size"], rms_norm_eps=1e-5)
    whole = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision.config, text_config=text)).eval()
    whole.model.vision_tower.load_state_dict(vision.state_dict())
    language = {
        name.removeprefix("model."): value
        for name, value in weights.items()
        if not name.startswith(("model.mm_projector", "lm_head")) and "inv_freq" not in name
    }
    whole.model.language_model.load_state_dict(language)
    whole.lm_head.weight.data = weights["lm_head.weight"]
    return whole


def expected_logits(folder: Path, weights: dict[str, torch.Tensor], pixels: torch.Tensor, ids: torch.Tensor) -> Any:
    """Tower, projector and language model one after the other; `ids` hold -200 for the image, as LLaVA's code does."""
    model = hugging_face(folder, weights)
    features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    at = "model.mm_projector"
    linear = torch.nn.functional.linear
    if f"{at}.weight" in weights:
        features = linear(features, weights[f"{at}.weight"], weights[f"{at}.bias"])
    else:
        features = linear(features, weights[f"{at}.0.weight"], weights[f"{at}.0.bias"])
        features = linear(torch.nn.functional.gelu(features), weights[f"{at}.2.weight"], weights[f"{at}.2.bias"])
    place = int((ids[0] == -200).nonzero())
    embed = model.get_input_embeddings()
    whole = torch.cat([embed(ids[:, :place]), features, embed(ids[:, place + 1 :])], dim=1)
    return model.lm_head(model.model.language_model(inputs_embeds=whole).last_hidden_state)


@pytest.fixture(scope="module", params=sorted(VERSIONS))
def original(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, torch.Tensor]]:
    return request.param, *save_original(tmp_path_factory.mktemp("original"), request.param)


def load(folder: Path) -> tuple[Any, Any]:
    return load_model(RunSpec.parse({"model": str(folder), "task": "diagramqa"}), CPU)


def test_it_computes_what_its_parts_compute(original: tuple[str, Path, dict[str, torch.Tensor]]) -> None:
    _, folder, weights = original
    model, processor = load(folder)
    text = "USER: <image>\nWhat is this? ASSISTANT:"
    inputs = processor(text=[text], images=[picture(0)], return_tensors="pt")
    before, behind = (processor.tokenizer(part, add_special_tokens=False).input_ids for part in text.split("<image>"))
    ids = torch.tensor([[*before, -200, *behind]])
    with torch.no_grad():
        expected = expected_logits(folder, weights, inputs["pixel_values"], ids)
        found = model(**inputs).logits
    vocabulary = len(weights["lm_head.weight"])
    torch.testing.assert_close(found[..., :vocabulary], expected, rtol=1e-5, atol=1e-5)
    assert found.shape[-1] == vocabulary + 1
    assert (found[..., vocabulary:] == 0).all()
    with torch.no_grad():
        assert (
            int(model.config.image_token_id) not in model.generate(**inputs, max_new_tokens=20, do_sample=True)[0, -20:]
        )


@pytest.mark.parametrize("method", pruners.names())
def test_every_pruner_runs(method: str, original: tuple[str, Path, dict[str, torch.Tensor]]) -> None:
    """Also those that weigh the question: the tower's own checkpoint holds the text tower."""
    _, folder, _ = original
    model, processor = load(folder)
    texts = ["USER: <image>\nWhat is this? ASSISTANT:", "USER: cat <image>\nWhere does the red fox live? ASSISTANT:"]
    inputs = processor(text=texts, images=[picture(0), picture(1)], return_tensors="pt", padding=True)
    spec = {"method": "rtn", "weights": {"bits": 4}, "activations": {"bits": 4}, "scope": ["language", "projector"]}
    with (
        torch.no_grad(),
        compress(model, {"quantize": spec, "prune": {"method": method, "keep": 5}}, processor) as receipt,
    ):
        assert torch.isfinite(model(**inputs).logits[:, -1]).all()
        model.generate(**inputs, max_new_tokens=3)
    receipt.check()
    assert receipt.fallbacks == []
    assert receipt.tokens["mean"] == 5 or receipt.tokens["mean"] == receipt.tokens["layer_mean"]
    assert {line.part for line in receipt.linears if line.calls} == {"language", "projector"}


def test_unpruned_and_unquantized_nothing_changes(original: tuple[str, Path, dict[str, torch.Tensor]]) -> None:
    model, processor = load(original[1])
    inputs = processor(text=["USER: <image>\nWhat? ASSISTANT:"], images=[picture(0)], return_tensors="pt")
    with torch.no_grad():
        plain = model(**inputs).logits
        for spec in ({}, {"prune": {"method": "random", "keep": 16}}):
            with compress(model, spec):
                assert torch.equal(model(**inputs).logits, plain)


def test_the_prompt_is_the_versions_own(original: tuple[str, Path, dict[str, torch.Tensor]]) -> None:
    version, folder, _ = original
    _, processor = load(folder)
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}]
    prompt = processor.apply_chat_template(message, add_generation_prompt=True)
    if version == "1.5":
        assert prompt == (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: <image>\nWhich? ASSISTANT:"
        )
    else:
        assert prompt.startswith("A chat between a curious human and an artificial")
        assert prompt.endswith("USER: <im_start><image><im_end>\nWhich? ASSISTANT:")


def test_oblong_pictures(original: tuple[str, Path, dict[str, torch.Tensor]]) -> None:
    """LLaVA-1.5 fills them up to a square with the mean colour; before, the middle was cut out."""
    version, folder, _ = original
    _, processor = load(folder)
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE // 2, SIDE, 3), dtype=np.uint8)
    found = processor.image_processor(Image.fromarray(pixels), return_tensors="pt").pixel_values[0]
    border = found[:, : SIDE // 4].flatten(1)
    assert bool((border.std(dim=1) < 1e-3).all() and (border.abs() < 0.02).all()) == (version == "1.5")


def test_the_tower_beside_the_weights_and_its_hash(tmp_path: Path) -> None:
    folder, _ = save_original(tmp_path, "1.5", mm_vision_tower="openai/clip-vit-large-patch14-336")
    spec = RunSpec.parse({"model": str(folder), "task": "diagramqa"})
    (tmp_path / "openai-clip").rename(folder / "clip")
    load(folder)
    outline = find_outline(spec.task)
    before = fingerprints(spec, outline, CPU, fetch=False)
    assert before["vision tower"] != before["model"]
    file = folder / "clip" / "preprocessor_config.json"
    file.write_text(file.read_text().replace("bicubic", "bicubic "))
    file.write_text(file.read_text() + "\n")

    assert fingerprints(spec, outline, CPU, fetch=False)["vision tower"] != before["vision tower"]


def test_a_tuned_tower_among_the_weights_wins(tmp_path: Path) -> None:
    folder, _ = save_original(tmp_path, "1.5")
    shard = folder / "model-00001-of-00002.safetensors"
    name = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    save_file({**load_file(shard), name: torch.full((32,), 7.0)}, shard, {"format": "pt"})
    model, _ = load(folder)
    assert torch.equal(model.model.vision_tower.embeddings.class_embedding, torch.full((32,), 7.0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mm_projector_type": "identity"}, "mm_projector_type 'identity' is not supported"),
        ({"model_type": "llava_mpt"}, "model_type 'llava_mpt' is not supported"),
        ({"image_aspect_ratio": "anyres"}, "image tiles .* Hugging Face layout"),
        ({"mm_vision_select_feature": "cls_patch"}, "the CLS token among the features"),
        ({"mm_vision_tower": "nowhere/at-all"}, "model.mm_vision_tower"),
        ({"num_hidden_layers": 3}, "lack model.language_model.layers.2"),
        ({"num_hidden_layers": 1}, "hold model.language_model.layers.1.* which has no place"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder, _ = save_original(tmp_path, "1.5", **change)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    """The command of the message, run as it stands, makes a folder that loads."""
    import subprocess
    import sys

    folder, weights = save_original(tmp_path, "1.5")
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    torch.save(weights, folder / "pytorch_model-00001-of-00001.bin")
    with pytest.raises(UserError, match="other formats are not loaded") as caught:
        load(folder)
    command = str(caught.value).partition('python -c "')[2].rpartition('"')[0]
    subprocess.run([sys.executable, "-c", command], cwd=folder, check=True, timeout=120)
    model, _ = load(folder)
    assert torch.equal(model.model.language_model.norm.weight, weights["model.norm.weight"])


@pytest.mark.parametrize("version", VERSIONS)
def test_its_cost_is_that_of_the_loaded_model(version: str, tmp_path: Path) -> None:
    """Without its weights, which may be away."""
    folder, _ = save_original(tmp_path, version)
    spec = {"quantize": {"method": "rtn", "weights": {"bits": 4}}, "prune": {"method": "cdpruner", "keep": 3}}
    model, _ = load_model(RunSpec.parse({"model": str(folder), "task": "scienceqa", "dtype": "bfloat16"}), CPU)
    wanted = cost(model, spec, PROMPTS["llava"])
    for file in folder.glob("*.safetensors"):
        file.unlink()
    found = cost(folder, {**spec, "dtype": "bfloat16"}, PROMPTS["llava"])
    assert found.work == wanted.work
    assert found.weight_bytes_by_part == wanted.weight_bytes_by_part
    assert found.tokens_per_layer == wanted.tokens_per_layer
