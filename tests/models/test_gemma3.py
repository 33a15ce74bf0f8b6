"""Gemma 3: the tokens that are left of an image see each other, and layers with a sliding window may be cut."""

from typing import Any

import pytest
import torch

from qapbench import UserError, compress
from qapbench.models.families.gemma3 import Gemma3
from qapbench.models.family import families
from qapbench.prune.build import build_pruning
from qapbench.prune.calls import PrunedCalls
from qapbench.prune.splice import PrunedImage
from qapbench.quantize.calibration import Calibration, CalibrationSamples
from qapbench.receipt import Receipt
from qapbench.spec.run_spec import PruneSpec

pytestmark = pytest.mark.usefixtures("one_thread")
INSIDE = [({"fastv": {"layer": 1}}, 1), ("fastv", 2), ({"fastv": {"layer": 3}}, 3), ({"dart": {"layer": 2}}, 2)]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "suppress_tokens": [3]}


@pytest.fixture(scope="module")
def made() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = Gemma3.tiny()
    return model.eval(), inputs


def padded(inputs: dict[str, Any]) -> dict[str, Any]:
    """Two rows, the first with one image and padded on the left, the second with two."""
    ids = inputs["input_ids"]
    two = torch.cat([ids, ids[:, 1:], torch.tensor([[11]])], dim=1)
    rows = torch.cat([torch.nn.functional.pad(ids, (two.shape[1] - ids.shape[1], 0)), two])
    mask = torch.ones_like(rows)
    mask[0, : two.shape[1] - ids.shape[1]] = 0
    pixels = torch.cat([inputs["pixel_values"], inputs["pixel_values"].flip(2), inputs["pixel_values"].flip(3)])
    return {
        "input_ids": rows,
        "attention_mask": mask,
        "token_type_ids": (rows == 3).long(),
        "pixel_values": pixels,
    }


def dropped(inputs: dict[str, Any], images: list[PrunedImage]) -> torch.Tensor:
    """[B, L] bool, True at the columns of tokens that were dropped."""
    gone = inputs["input_ids"] == 3
    places = gone.nonzero()
    for at, image in enumerate(images):
        rows, columns = places[at * 16 : (at + 1) * 16][image.indices].unbind(dim=1)
        gone[rows, columns] = False
    return gone


@torch.no_grad()
def unseen(model: Any, inputs: dict[str, Any], gone: torch.Tensor, start: int) -> torch.Tensor:
    """Logits of the plain model where the layers from `start` on do not see the dropped columns, nor anything else."""
    handles = []
    for layer in model.model.language_model.layers[start:]:

        def masked(module: Any, args: Any, kwargs: Any) -> Any:
            mask = kwargs["attention_mask"] & ~gone[:, None, None, :]
            return args, {**kwargs, "attention_mask": mask | torch.eye(gone.shape[1], dtype=torch.bool)}

        handles.append(layer.register_forward_pre_hook(masked, with_kwargs=True))
    try:
        return model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("pruner, start", INSIDE)
def test_what_is_dropped_inside_is_not_seen(pruner: Any, start: int, made: tuple[Any, dict[str, Any]]) -> None:
    """The oracle: the plain model with its own masks, in which later layers do not look at what was dropped."""
    model, alone = made
    for inputs in (alone, padded(alone)):
        kept: list[list[PrunedImage]] = []
        with torch.no_grad(), compress(model, {"prune": {"method": pruner, "keep": 5}}, on_images=kept.append):
            found = model(**inputs).logits[:, -1]
            written = model.generate(**inputs, **GREEDY)
            uncached = model.generate(**inputs, **GREEDY, use_cache=False)
        expected = unseen(model, inputs, dropped(inputs, kept[0]), start)[:, -1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, model(**inputs).logits[:, -1], atol=1e-3)
        assert torch.equal(written, uncached)


@pytest.mark.parametrize("layer, turned", [(1, 0), (2, 1), (3, 2)])
def test_attention_is_that_of_the_layer_which_is_read(
    layer: int, turned: int, made: tuple[Any, dict[str, Any]]
) -> None:
    """Layers with a window turn their keys by another angle than the others, which stand between them."""
    model, inputs = made
    views: list[Any] = []
    spec = PruneSpec.model_validate({"method": {"fastv": {"layer": layer}}, "keep": 5})
    pruning = build_pruning(Gemma3(model), spec, Receipt(), on_view=views.append)
    with torch.no_grad(), PrunedCalls(pruning).installed():
        model(**inputs)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    expected = maps[turned][0].mean(dim=0)[-1][inputs["input_ids"][0] == 3]
    torch.testing.assert_close(views[0].relevance, expected, rtol=1e-4, atol=1e-6)


def test_a_prompt_longer_than_the_window_is_refused_inside_alone(made: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = made
    layers = model.model.language_model.layers
    length = inputs["input_ids"].shape[1]
    held = model.config.text_config.sliding_window
    try:
        for window in (length - 1, length):
            model.config.text_config.sliding_window = window
            for layer in layers:
                layer.self_attn.sliding_window = window if layer.self_attn.is_sliding else None
            with torch.no_grad(), compress(model, {"prune": {"method": "random", "keep": 5}}):
                assert torch.isfinite(model(**inputs).logits).all()
            refused = pytest.raises(UserError, match=f"more than the {window} that the model's layers")
            with torch.no_grad(), compress(model, {"prune": {"method": "fastv", "keep": 5}}), refused:
                model.generate(**inputs, **GREEDY)
    finally:
        model.config.text_config.sliding_window = held
        for layer in layers:
            layer.self_attn.sliding_window = held if layer.self_attn.is_sliding else None


def test_attention_that_calibration_reads_is_what_the_mask_lets_through(made: tuple[Any, dict[str, Any]]) -> None:
    """An image's tokens see each other; the layer's own eager attention says the same."""
    model, inputs = made
    kind = families.create("gemma3")
    found: dict[str, torch.Tensor] = {}

    def find(block: Any) -> Any:
        received = block.attention_received()
        if received is not None:
            found[block.name] = received[0]
        return {}

    model.requires_grad_(False)
    family = kind(model)
    Calibration(model, CalibrationSamples([inputs]), family).block_by_block(family.linears(["language"]), find)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    assert len(found) == 4
    for received, weights in zip(found.values(), maps, strict=True):
        torch.testing.assert_close(received, weights[0].mean(dim=0).sum(dim=0), rtol=1e-3, atol=1e-5)


def test_a_projector_without_linears_is_said(made: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = made
    spec: dict[str, Any] = {"method": "rtn", "weights": {"bits": 4, "group_size": 16}}
    with torch.no_grad(), compress(model, {"quantize": {**spec, "scope": ["language", "projector"]}}) as receipt:
        model(**inputs)
    receipt.check()
    assert receipt.fallbacks == ["projector: left in full precision, because it has no linear layers"]
    nothing = compress(model, {"quantize": {**spec, "scope": ["projector"]}})
    with pytest.raises(UserError, match=r"quantize\.scope: the projector of a gemma3 has no linear layers"), nothing:
        pass
