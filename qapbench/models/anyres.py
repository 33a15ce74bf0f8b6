"""Images of any shape, cut into tiles beside a small whole, with a new-line token behind each row (LLaVA-NeXT)."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qapbench.errors import UserError
from qapbench.tokens import VisionTokens, per_token

from .tower import TowerFamily
from .views import Seen, SeenImage, Views

WHOLE = -1  # row of the places that belong to no line


class AnyResFamily(TowerFamily):
    """The whole picture first, then the patches of all tiles line by line, padding cut off.

    Each tile is a view, and so is the whole. A new line closes each line of patches; it stays while a token of its
    line does. Where the packing also shrinks the patches, what is recorded of them is shrunk alike, and a shrunk patch
    belongs to the tile that its centre is in.
    """

    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")

    @abc.abstractmethod
    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords of the model's `get_image_features`."""

    @abc.abstractmethod
    def tiling(self, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of tiles of each image; (0, 0) where there is the whole alone."""

    @abc.abstractmethod
    def pack(self, tiles: Tensor, size: Tensor, newline: Tensor, shrink: bool = True) -> Tensor:
        """The model's own packing of one image's tiles [T, N, C], the whole first, into one sequence [L, C].

        Args:
            size: height and width of the image in pixels.
            newline: [C].
            shrink: whether patches may be resampled, where the model does so.
        """

    @torch.no_grad()
    def look(self, inputs: Mapping[str, Any], needs: frozenset[str]) -> Seen:
        if inputs.get("image_sizes") is None:
            raise UserError("image_sizes: needed beside pixel_values; the processor gives both")
        pixels: list[Tensor] = []
        handle = self.model.model.vision_tower.register_forward_pre_hook(lambda _, args: pixels.append(args[0]))
        try:
            with self.recording(needs) as seen:
                outputs = self.model.model.get_image_features(**self.arguments(inputs), return_dict=True)
        finally:
            handle.remove()
        tiles, start = VisionTokens(**self.fields(seen, needs, pixels[0])), 0
        images, views = [], []
        for index, (features, tiling) in enumerate(zip(outputs.pooler_output, self.tiling(inputs), strict=True)):
            stop = start + 1 + math.prod(tiling)
            image, own = self._image(tiles[start:stop], features, inputs["image_sizes"][index], tiling, index)
            images.append(image)
            views += own
            start = stop
        return Seen(images, Views.grouped(views))

    def _image(
        self, tiles: VisionTokens, features: Tensor, size: Tensor, tiling: tuple[int, int], owner: int
    ) -> tuple[SeenImage, list[Views]]:
        """One image [L, D] and its views."""
        blank = tiles.projected.new_zeros(tiles.batch, tiles.count, 1)
        separators = self.pack(blank, size, blank.new_ones(1))[:, 0] > 0.5
        rows = torch.full_like(separators, WHOLE, dtype=torch.long)
        whole = torch.arange(tiles.count, device=features.device)
        views = [Views(tiles[0], [owner], whole[None])]
        if not math.prod(tiling):
            return SeenImage(features, separators, rows), views
        side = math.isqrt(tiles.count)
        lines = int(separators.sum())
        width = (len(features) - tiles.count) // lines
        canvas = torch.arange(tiles.count, len(features), device=features.device).view(lines, width)
        rows[tiles.count :] = torch.arange(lines, device=features.device).repeat_interleave(width)
        # Where every place would come from without shrinking: its top left corner says what padding was cut off.
        order = torch.arange(blank.numel(), dtype=blank.dtype, device=blank.device).view_as(blank)
        source = self.pack(order, size, blank.new_full((1,), -1), shrink=False)[tiles.count :, 0].long()
        full_lines = int((source < 0).sum())
        shape = (full_lines, len(source) // full_lines)
        tile, patch = divmod(int(source[0]) - tiles.count, tiles.count)
        top = tile // tiling[1] * side + patch // side
        left = tile % tiling[1] * side + patch % side
        packed = self._packed(tiles, features, size, shape != (lines, width), source)
        tile_rows = self._tile_of(lines, shape[0], top, side)
        tile_columns = self._tile_of(width - 1, shape[1] - 1, left, side)
        for index in range(math.prod(tiling)):
            down = (tile_rows == index // tiling[1]).nonzero()[:, 0]
            along = (tile_columns == index % tiling[1]).nonzero()[:, 0]
            if not len(down) or not len(along):
                continue  # nothing but padding
            places = canvas[down][:, along].flatten()
            own = {name: getattr(tiles, name) for name in ("cls_token", "image_ids")}
            own = {name: value[index + 1 : index + 2] for name, value in own.items() if value is not None}
            tokens = VisionTokens(**packed, **own, heads=tiles.heads).take(places, (len(down), len(along)))
            views.append(Views(tokens, [owner], places[None]))
        return SeenImage(features, separators, rows), views

    def _packed(
        self, tiles: VisionTokens, features: Tensor, size: Tensor, shrunk: bool, source: Tensor
    ) -> dict[str, Any]:
        """Every field per token as one sequence [1, L, ...], like the features."""
        packed = {"projected": features[None]}
        whole = torch.arange(tiles.count, device=source.device)
        index = torch.cat([whole, source.clamp(min=0)])  # new lines hold anything: no view contains them
        for name in per_token():
            value = getattr(tiles, name)
            if value is None or name == "projected":
                continue
            wide = value if value.ndim == 3 else value.unsqueeze(-1)
            laid = self.pack(wide, size, wide.new_zeros(wide.shape[-1])) if shrunk else wide.flatten(0, 1)[index]
            packed[name] = laid[None] if value.ndim == 3 else laid[None, :, 0]
        return packed

    def _tile_of(self, count: int, full: int, offset: int, side: int) -> Tensor:
        """[count] the row (or column) of tiles that each line (or place in it) is in."""
        centre = (torch.arange(count) + 0.5) * full / count
        return ((centre + offset) // side).long()
