"""The image at a lower size where it is cut into tiles that are joined by new lines: LLaVA-NeXT and OneVision."""

from typing import Any

import pytest
import torch

from qapbench.models.anyres import AnyResFamily
from qapbench.models.families.llava_next import LlavaNext
from qapbench.models.families.llava_onevision import LlavaOneVision

each = pytest.mark.parametrize("kind", [LlavaNext, LlavaOneVision])
PATCH, SIDE = 8, 4  # pixels of a patch, patches of a tile


def loaded(kind: type[AnyResFamily], sizes: list[tuple[int, int]]) -> tuple[AnyResFamily, dict[str, Any]]:
    """A tiny model, and images of these sizes with five rows of pixels each, each in a prompt of its own."""
    torch.manual_seed(0)
    model, _ = kind.tiny()
    inputs = {
        "pixel_values": torch.rand(len(sizes), 5, 3, SIDE * PATCH, SIDE * PATCH),
        "image_sizes": torch.tensor(sizes),
        "batch_num_images": torch.ones(len(sizes), dtype=torch.long),
    }
    return kind(model), {name: inputs[name] for name in kind.image_inputs}


@each
def test_at_its_own_size_each_view_is_what_the_tower_made_of_it(kind: type[AnyResFamily]) -> None:
    """Also where images of a call have different numbers of tiles, and rows of pixels that nobody encodes."""
    family, inputs = loaded(kind, [(32, 64), (64, 64), (64, 32)])
    (views,) = family.encode_images(inputs, frozenset()).views
    assert [window.row for window in views.windows] == list(range(3 + 5 + 3))
    same = family.downsampled(inputs, SIDE * SIDE, views).flatten(2).mT
    torch.testing.assert_close(same, views.tokens.projected)
    assert family.downsampled(inputs, 5, views).shape == (11, 48, 3, 2)


@each
def test_the_padding_of_a_tile_is_not_seen(kind: type[AnyResFamily]) -> None:
    """An image 64 pixels wide and 20 high stands in the middle of two tiles: two of their four lines of patches."""
    family, inputs = loaded(kind, [(20, 64)])
    whole, tiles = family.encode_images(inputs, frozenset()).views
    assert (whole.tokens.grid, tiles.tokens.grid) == ((4, 4), (2, 4))
    assert [(one.row, one.top, one.bottom, one.left, one.right) for one in tiles.windows] == [
        (1, 1, 3, 0, 4),
        (2, 1, 3, 0, 4),
    ]
    before = family.downsampled(inputs, 2, tiles)
    assert before.shape == (2, 48, 1, 2)
    inputs["pixel_values"][:, 1:, :, :PATCH] = 9
    inputs["pixel_values"][:, 1:, :, 3 * PATCH :] = -9
    assert torch.equal(family.downsampled(inputs, 2, tiles), before)
    inputs["pixel_values"][:, 2, :, PATCH] = 5
    after = family.downsampled(inputs, 2, tiles)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_a_tile_whose_patches_are_shrunk_is_seen_whole() -> None:
    """OneVision resamples the patches of images with many tiles; their windows are those of the tiles themselves."""
    family, inputs = loaded(LlavaOneVision, [(64, 64)])
    family.model.config.vision_aspect_ratio = "anyres_max_1"
    groups = family.encode_images(inputs, frozenset()).views
    tokens = sum(group.tokens.batch * group.tokens.count for group in groups)
    assert tokens < 5 * SIDE * SIDE, "they are shrunk"
    windows = sorted((window for group in groups for window in group.windows), key=lambda one: one.row)
    assert [(one.row, one.top, one.bottom, one.left, one.right) for one in windows] == [
        (row, 0, SIDE, 0, SIDE) for row in range(5)
    ]
    for group in groups:
        assert family.downsampled(inputs, 1, group).shape == (group.tokens.batch, 48, 1, 1)


def test_images_that_share_a_prompt_have_no_tiles() -> None:
    family, inputs = loaded(LlavaOneVision, [(32, 64), (64, 64)])
    inputs["batch_num_images"] = torch.tensor([2])
    (views,) = family.encode_images(inputs, frozenset()).views
    torch.testing.assert_close(family.downsampled(inputs, SIDE * SIDE, views).flatten(2).mT, views.tokens.projected)
