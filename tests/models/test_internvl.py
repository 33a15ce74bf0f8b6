"""InternVL3.5: InternVL's family with a Qwen3 decoder; beams; attention of towers that normalise queries and keys."""

from typing import Any

import pytest
import torch

from qapbench import compress
from qapbench.models.families.internvl import InternVL
from qapbench.models.family import family_of
from qapbench.prune.splice import PrunedImage

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "suppress_tokens": [3]}


@pytest.fixture(scope="module", params=[False, True])
def made(request: Any) -> tuple[Any, dict[str, Any]]:
    """With layer norms as the 300M tower of the models up to 38B has them, and with normalised queries and keys."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    torch.manual_seed(0)
    tiny, inputs = InternVL.tiny()
    parts = tiny.config.to_dict()
    text = {**parts["text_config"], "model_type": "qwen3", "head_dim": 12}
    vision = {**parts["vision_config"], "use_qk_norm": request.param}
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=3, image_seq_length=16)
    model = InternVLForConditionalGeneration(config).eval()
    assert type(model.model.language_model).__name__ == "Qwen3Model"
    for norm in model.model.vision_tower.encoder.layer[-1].attention.q_norm.parameters():
        norm.data.uniform_(0.5, 2)
    return model, inputs


@torch.no_grad()
def test_it_answers_as_hugging_face_does(made: tuple[Any, dict[str, Any]]) -> None:
    """Nothing pruned: to the bit, in a forward pass and in generation, also by pruners that keep everything."""
    model, inputs = made
    plain, text = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    for spec in ({}, *({"prune": {"method": name, "keep": 16}} for name in ("visionzip", "fastv", "dart"))):
        with compress(model, spec):
            assert torch.equal(model(**inputs).logits, plain)
            assert torch.equal(model.generate(**inputs, **GREEDY), text)


@pytest.mark.parametrize("method", ["attention", "fastv", "visionzip"])
@torch.no_grad()
def test_beams_of_a_pruned_prompt(method: str, made: tuple[Any, dict[str, Any]]) -> None:
    """Features of images are repeated with their prompt, though this model wants one tensor of all images."""
    model, inputs = made
    kept: list[list[PrunedImage]] = []
    with compress(model, {"prune": {"method": method, "keep": 5}}, on_images=kept.append):
        beams = model.generate(**inputs, **{**GREEDY, "num_beams": 3, "num_return_sequences": 3})
        sampled = model.generate(**inputs, **{**GREEDY, "do_sample": True, "top_k": 1, "num_return_sequences": 2})
        greedy = model.generate(**inputs, **GREEDY)
    assert beams.shape[0] == 3
    assert torch.equal(sampled, greedy.expand(2, -1))
    assert kept[0][0].indices.tolist() == kept[1][0].indices.tolist()


@torch.no_grad()
def test_attention_is_that_of_normalised_queries_and_keys(made: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = made
    tokens = family_of(model).encode_images(inputs, frozenset({"cls_attention"})).views[0].tokens
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        maps = tower(inputs["pixel_values"], output_attentions=True).attentions[-1]
    finally:
        tower.set_attn_implementation(before)
    rows = maps.mean(dim=1)[:, 0, 1:].view(-1, 4, 2, 4, 2).mean(dim=(2, 4)).flatten(1)
    torch.testing.assert_close(tokens.cls_attention, rows, rtol=1e-4, atol=1e-6)
