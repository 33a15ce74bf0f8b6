"""Qwen3-VL's DeepStack: features that are added behind the first decoder layers are cut by the index of the tokens."""

from typing import Any

import pytest
import torch

from qapbench import compress
from qapbench.models.family import families, family_of
from qapbench.prune.splice import Part, PrunedImage, splice

pytestmark = pytest.mark.usefixtures("one_thread")
COLUMNS = slice(3, 23)  # those of the image in the tiny prompt


@pytest.fixture(scope="module")
def made() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model, inputs = families.create("qwen3_vl").tiny()
    for weight in model.model.visual.deepstack_merger_list.parameters():
        weight.data *= 20  # so that a wrong row would show
    return model.eval(), inputs


def padded(inputs: dict[str, Any]) -> dict[str, Any]:
    """Two rows with an image each, the second longer by two tokens of text."""
    ids = inputs["input_ids"]
    rows = torch.cat([torch.nn.functional.pad(ids, (2, 0)), torch.cat([ids, torch.tensor([[11, 12]])], dim=1)])
    mask = torch.ones_like(rows)
    mask[0, :2] = 0
    pixels = torch.cat([inputs["pixel_values"], inputs["pixel_values"].flip(0)])
    grids = inputs["image_grid_thw"].repeat(2, 1)
    types = (rows == 3).long()
    names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
    return dict(zip(names, (rows, mask, types, pixels, grids), strict=True))


@torch.no_grad()
def hidden_from(model: Any, inputs: dict[str, Any], gone: dict[int, torch.Tensor]) -> torch.Tensor:
    """Logits of the plain model where the layers from some index on do not see the dropped columns [B, L]."""
    mask = inputs["attention_mask"].bool()
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    itself = torch.eye(length, dtype=torch.bool)
    handles = []
    for index, layer in enumerate(model.model.language_model.layers):
        hidden = torch.zeros_like(mask)
        for start, columns in gone.items():
            hidden |= columns if index >= start else False
        seen = (causal & (mask & ~hidden)[:, None, None, :]) | itself

        def masked(module: Any, args: Any, kwargs: Any, seen: torch.Tensor = seen) -> Any:
            return args, {**kwargs, "attention_mask": seen}

        handles.append(layer.register_forward_pre_hook(masked, with_kwargs=True))
    try:
        return model(**inputs).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("pruner, start", [({"fastv": {"layer": 1}}, 1), ("fastv", 2), ({"dart": {"layer": 3}}, 3)])
def test_a_drop_before_between_and_behind_the_added_features(
    pruner: Any, start: int, made: tuple[Any, dict[str, Any]]
) -> None:
    """The oracle: the plain model, in which later layers do not look at what was dropped. Alone, and padded."""
    model, alone = made
    for inputs in (alone, padded(alone)):
        kept: list[list[PrunedImage]] = []
        spec = {"prune": {"method": pruner, "keep": 5}}
        with torch.no_grad(), compress(model, spec, on_images=kept.append):
            found = model(**inputs).logits[:, -1]
            written = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
        gone = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for row, image in enumerate(kept[0]):
            columns = (inputs["input_ids"][row] == 3).nonzero()[:, 0]
            gone[row, columns] = True
            gone[row, columns[image.indices]] = False
        expected = hidden_from(model, inputs, {start: gone})[:, -1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, model(**inputs).logits[:, -1], atol=1e-3)
        assert torch.equal(written[:, -3], expected.argmax(dim=-1))


def test_a_merged_token_has_the_added_features_of_its_place(made: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = made
    image = family_of(model).encode_images(inputs, frozenset()).images[0]
    width = model.config.text_config.hidden_size
    assert image.features.shape == (20, 3 * width)
    own, merged = torch.tensor([4, 9]), torch.full((2, width), 7.0)
    part = Part(
        torch.cat([merged[:1], image.features[own, :width], merged[1:]]), own, torch.arange(20), (0, 0), front=1
    )
    pruned = splice(image, [part])
    assert pruned.places.tolist() == [0, 4, 9, 19]
    assert torch.equal(pruned.features[:, width:], image.features[pruned.places, width:])
    assert torch.equal(pruned.features[1:3], image.features[own])
    assert (pruned.features[[0, 3], :width] == 7).all()


def test_the_mergers_are_quantized_with_the_projector(made: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = made
    spec = {"quantize": {"method": "rtn", "weights": {"bits": 4, "group_size": 16}, "scope": ["projector"]}}
    with torch.no_grad(), compress(model, spec) as receipt:
        model(**inputs)
    receipt.check()
    assert sorted({line.name.split(".")[2] for line in receipt.linears}) == ["deepstack_merger_list", "merger"]
    assert all(line.calls for line in receipt.linears)
