"""MiniCPM-V 4.6: slices of their own shapes, fields that are means over patches, and the image at a lower size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from family_checkpoints import PICTURE, save_family, spread, template

from qapbench import UserError, compress
from qapbench.models import family_of
from qapbench.models.families.minicpmv4_6 import MiniCPMV46

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made() -> tuple[Any, dict[str, Any]]:
    return spread("minicpmv4_6", 0.1)


def test_the_processor_of_a_folder_has_its_chat_template(tmp_path: Path) -> None:
    processor = MiniCPMV46.load_processor(save_family("minicpmv4_6", tmp_path / "model"))
    assert processor.chat_template == template(PICTURE["minicpmv4_6"])


def test_fields_are_means_over_the_patches_of_a_token(made: tuple[Any, dict[str, Any]]) -> None:
    """Of the last layer, behind the merger inside the tower (2 x 2), and of an early one in front of it (4 x 4)."""
    model, inputs = made
    tower, seen = model.model.vision_tower, {}
    handles = [
        getattr(layer.self_attn, name).register_forward_hook(
            lambda _, args, out, at=(where, name): seen.update({at: out[0]})
        )
        for where, layer in (("last", tower.encoder.layers[-1]), ("early", tower.encoder.layers[0]))
        for name in ("q_proj", "k_proj")
    ]
    needs = frozenset({"keys", "attention_received", "shallow_cls_attention", "patches"})
    encoded = family_of(model).encode_images(inputs, needs)
    for handle in handles:
        handle.remove()
    whole, cut = (group.tokens for group in encoded.views)
    assert (whole.grid, cut.grid, cut.batch) == ((3, 6), (4, 4), 2)
    assert [group.places[-1, -1].item() for group in encoded.views] == [17, 49]
    assert whole.keys is not None
    assert whole.attention_received is not None
    assert cut.shallow_cls_attention is not None
    # The scaled-down image has 6 x 12 merged patches, which come first.
    query, key = (seen["last", name][:72].unflatten(-1, (4, 8)).transpose(0, 1) for name in ("q_proj", "k_proj"))
    rows = (query @ key.mT / 8**0.5).softmax(dim=-1).mean(dim=(0, 1)).view(6, 12)
    keys = seen["last", "k_proj"][:72].view(6, 12, -1)
    for row, column in ((0, 0), (1, 4), (2, 5)):
        at = 6 * row + column
        corner = (slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
        torch.testing.assert_close(whole.attention_received[0, at], rows[corner].mean())
        torch.testing.assert_close(whole.keys[0, at], keys[corner].mean(dim=(0, 1)))
    # The second slice has the last 16 x 16 patches.
    query, key = (seen["early", name][-256:].unflatten(-1, (4, 8)).transpose(0, 1) for name in ("q_proj", "k_proj"))
    rows = (query @ key.mT / 8**0.5).softmax(dim=-1).mean(dim=(0, 1)).view(16, 16)
    for row, column in ((0, 0), (1, 3), (3, 2)):
        found = rows[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].mean()
        torch.testing.assert_close(cut.shallow_cls_attention[1, 4 * row + column], found)
    for group in (whole, cut):
        torch.testing.assert_close(family_of(model).project(group.patches), group.projected)


def test_the_image_at_its_own_size_is_the_image(made: tuple[Any, dict[str, Any]]) -> None:
    """Cut into patches and put together again; at a lower size there are fewer tokens of the same shape."""
    model, inputs = made
    family = family_of(model)
    for group in family.encode_images(inputs, frozenset()).views:
        same = family.downsampled(inputs, group.tokens.count, group)
        torch.testing.assert_close(same.flatten(2).mT, group.tokens.projected, rtol=1e-4, atol=1e-5)
        assert family.downsampled(inputs, 5, group).shape[-2:] == ((3, 2) if group.tokens.grid == (4, 4) else (2, 3))


def test_images_are_told_apart_by_their_marks(made: tuple[Any, dict[str, Any]]) -> None:
    """Two cut images side by side, and a third one that is not cut."""
    model, inputs = made
    ids, sizes = inputs["input_ids"][:, 2:-2], inputs["target_sizes"]
    small = torch.tensor([[1, 5, *[3] * 16, 6, 10]])
    whole = torch.cat([ids[:, :0], ids, ids, small], dim=1)
    more = {"target_sizes": torch.cat([sizes, sizes, sizes[1:2]])}
    more["pixel_values"] = torch.rand(1, 3, 2, 2 * int(more["target_sizes"].prod(dim=-1).sum()))
    images = family_of(model).encode_images({"input_ids": whole, **more}, frozenset()).images
    assert [image.count for image in images] == [50, 50, 16]
    with pytest.raises(UserError, match="image placeholders"):
        family_of(model).encode_images({"input_ids": ids, **more}, frozenset())


@pytest.mark.parametrize("size", [(32, 64), (30, 31), (70, 40), (20, 90)])
def test_the_outline_is_what_the_processor_makes(
    made: tuple[Any, dict[str, Any]], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from family_checkpoints import MiniCPMV4_6ImageProcessorPil, picture_of

    monkeypatch.setattr(MiniCPMV46, "longest", 32)
    images = MiniCPMV4_6ImageProcessorPil(scale_resolution=32, patch_size=2)
    grids = images(picture_of(size[::-1], 0), return_tensors="pt")["target_sizes"]
    outline = family_of(made[0]).outline([size])
    assert outline.patches == int(grids.prod(dim=-1).sum())
    assert [image.count for image in outline.encoded.images] == [outline.patches // 16]
    assert outline.attended[0] == tuple(grids.prod(dim=-1).tolist())


def test_a_mode_of_one_call_is_refused(made: tuple[Any, dict[str, Any]]) -> None:
    model, inputs = made
    spec = {"prune": {"method": "random", "keep": 5}}
    with torch.no_grad(), compress(model, spec), pytest.raises(UserError, match="downsample_mode: set it in the model"):
        model(**inputs, downsample_mode="4x")
