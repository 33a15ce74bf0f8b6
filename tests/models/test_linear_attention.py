"""Decoders with linear attention: states hold the tokens that are left, gated queries are read, and what is refused."""

from typing import Any

import pytest
import torch
from family_checkpoints import spread

from qapbench import UserError, compress, cost
from qapbench.models import family_of
from qapbench.models.layers import attention_rows
from qapbench.prune.splice import PrunedImage

pytestmark = pytest.mark.usefixtures("one_thread")
FASTV = {"prune": {"method": "fastv", "keep": 5}}


@pytest.fixture(scope="module")
def made() -> tuple[Any, dict[str, Any]]:
    return spread("qwen3_5", 0.15)


@torch.no_grad()
def answered(model: Any, inputs: dict[str, Any], **more: Any) -> list[int]:
    out = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, **more)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def test_the_state_goes_on_from_the_tokens_that_are_left(made: tuple[Any, dict[str, Any]]) -> None:
    """The layers behind the drop, one of linear attention first, run by hand on the columns that FastV keeps."""
    model, inputs = made
    kept: list[list[PrunedImage]] = []
    with compress(model, FASTV, on_images=kept.append):
        found = model(**inputs).logits[0, -1]
    language, ids = model.model.language_model, inputs["input_ids"]
    images = (ids[0] == 3).nonzero()[:, 0]
    left = torch.cat([(ids[0] != 3).nonzero()[:, 0], images[kept[0][0].indices]]).sort().values
    assert len(left) == 6 + 5
    embeds = model.get_input_embeddings()(ids)
    embeds[0, images] = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output[
        0
    ]
    rotary = language.rotary_emb(embeds, family_of(model).positions(inputs))
    hidden = embeds
    for index, layer in enumerate(language.layers):
        if index == 2:
            hidden, rotary = hidden[:, left], tuple(part[:, left] for part in rotary)
        length = hidden.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None] if index % 2 else None
        hidden = layer(hidden, position_embeddings=rotary, attention_mask=seen)
    expected = model.lm_head(language.norm(hidden))[0, -1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prune", [{"method": "fastv", "keep": 5}, {"method": "vtw", "keep": 12}, None])
def test_an_answer_without_a_cache_is_the_same(made: tuple[Any, dict[str, Any]], prune: Any) -> None:
    model, inputs = made
    with compress(model, {"prune": prune}):
        cached = answered(model, inputs)
        assert answered(model, inputs, use_cache=False) == cached
    if prune is None:
        assert answered(model, inputs) == cached


@torch.no_grad()
def test_rows_of_a_batch_are_cut_apart(made: tuple[Any, dict[str, Any]]) -> None:
    """Padded rows, in front of the image and in the cut layers alike: each has the logits that it has alone."""
    model, inputs = made
    ids, pads = inputs["input_ids"], 4
    longer = torch.cat([ids[:, :-1], torch.tensor([[11, 12, 13, 14]]), ids[:, -1:]], dim=1)
    both = torch.cat([torch.cat([torch.zeros(1, pads, dtype=torch.long), ids], dim=1), longer])
    mask = torch.ones_like(both)
    mask[0, :pads] = 0
    twice = {name: torch.cat([inputs[name]] * 2) for name in ("pixel_values", "image_grid_thw")}
    batch = {**twice, "input_ids": both, "attention_mask": mask, "mm_token_type_ids": (both == 3).long()}
    alone = {**inputs, "input_ids": longer, "attention_mask": torch.ones_like(longer)}
    alone["mm_token_type_ids"] = (longer == 3).long()
    with compress(model, FASTV):
        together = model(**batch).logits[:, -1]
        rows = torch.cat([model(**one).logits[:, -1] for one in (inputs, alone)])
    torch.testing.assert_close(together, rows, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_gates_beside_queries_are_left_out(made: tuple[Any, dict[str, Any]]) -> None:
    """The attention that a pruner reads is that of the layer's own eager attention."""
    model, inputs = made
    language, seen = model.model.language_model, {}
    attention = language.layers[1].self_attn
    for name in ("q_proj", "k_proj"):
        getattr(attention, name).register_forward_hook(lambda _, args, out, name=name: seen.update({name: out[0]}))
    hook = attention.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    own = attention.register_forward_hook(lambda _, args, out: seen.update(own=out[1][0].mean(dim=0)))
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    model(**inputs)
    model.set_attn_implementation(before)
    hook.remove()
    own.remove()
    rotary = tuple(part[0] for part in seen["position_embeddings"])
    rows = attention_rows(attention, seen["q_proj"], seen["k_proj"], rotary, torch.arange(len(seen["q_proj"])))
    torch.testing.assert_close(rows, seen["own"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "method, message",
    [
        ({"fastv": {"layer": 3}}, "reads attention of decoder layer 3, .* layers that do are 2, 4"),
        ("pyramiddrop", "drops tokens behind decoder layer 1; the first drop can be behind layer 2"),
    ],
)
def test_what_cannot_be_read_is_refused(made: tuple[Any, dict[str, Any]], method: Any, message: str) -> None:
    """While a prompt is answered, and where its cost is asked."""
    model, inputs = made
    spec = {"prune": {"method": method, "keep": 5}}
    with torch.no_grad(), pytest.raises(UserError, match=message), compress(model, spec):
        model(**inputs)
    with pytest.raises(UserError, match=message):
        cost(model, spec)
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
