"""Images of any shape as in LLaVA-NeXT: a scaled-down whole image, and tiles with a new-line token after each line."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from qapbench.errors import UserError
from qapbench.methods.tokens import VisionTokens, per_token

from .encoded import EncodedImage, EncodedImages, Views, Window
from .outline import ImageOutline, Size, blank_tokens
from .tower import TowerFamily, scaled, smaller_grid

WHOLE = -1  # in `EncodedImage.rows`: places of the scaled-down whole image, which counts as one line


class AnyResFamily(TowerFamily):
    """Families that encode an image as a scaled-down whole followed by tiles of the full image.

    The language model reads the whole image first. Then it reads the patches of all tiles line by line across the full
    image, with padding cut off and a new-line token after each line. The whole image and each tile are views, so each
    is pruned by itself. A new-line token stays as long as any token of its line does.

    Some models also shrink the patches when they pack them. Then the recorded fields are shrunk in the same way, and a
    shrunk patch belongs to the tile in which its centre lies.
    """

    image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")

    @abc.abstractmethod
    def arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments for the model's `get_image_features`."""

    @abc.abstractmethod
    def tiling(self, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """For each image its number of tiles, as (rows, columns). (0, 0) if the image is encoded without tiles."""

    @abc.abstractmethod
    def pack(self, tiles: Tensor, size: Tensor, newline: Tensor, shrink: bool = True) -> Tensor:
        """Join the tiles of one image into one sequence [L, C], as the model itself does.

        Args:
            tiles: [T, N, C] the scaled-down whole image, then the tiles.
            size: height and width of the image in pixels.
            newline: [C] value of the new-line token.
            shrink: whether patches may be resampled to fewer, if the model does so.
        """

    @torch.no_grad()
    def encode_images(self, inputs: Mapping[str, Any], needs: frozenset[str]) -> EncodedImages:
        """Run vision tower and projector on all tiles of the call at once; see `Family.encode_images`."""
        if inputs.get("image_sizes") is None:
            raise UserError("image_sizes: needed beside pixel_values; the processor gives both")
        with self.recording(needs) as captured:
            outputs = self.model.model.get_image_features(**self.arguments(inputs), return_dict=True)
        tiles, start = VisionTokens(**self.fields(captured, needs, self._tiles(inputs))), 0
        images, views = [], []
        for index, (features, tiling) in enumerate(zip(outputs.pooler_output, self.tiling(inputs), strict=True)):
            stop = start + 1 + math.prod(tiling)
            image, own = self._image(tiles[start:stop], features, inputs["image_sizes"][index], tiling, (index, start))
            images.append(image)
            views += own
            start = stop
        return EncodedImages(images, Views.grouped(views))

    @property
    def available_fields(self) -> frozenset[str]:
        """All fields of the vision tower, and whole images and tiles at a lower size."""
        return super().available_fields | {"downsampled"}

    @torch.no_grad()
    def downsampled(self, inputs: Mapping[str, Any], count: int, views: Views) -> Tensor:
        """What the views show at a lower size, without the padding of their tiles; see `Family.downsampled`.

        Position embeddings are interpolated. Patches that the model shrinks when it packs them are not shrunk here,
        since what the tower makes has the size that is asked for.
        """
        pixels, patch, tower = self._tiles(inputs), self.vision.patch_size, self.model.model.vision_tower
        rows, columns = smaller_grid(views.tokens.grid or (1, views.tokens.count), count)
        small = [
            scaled(
                pixels[one.row, None, :, one.top * patch : one.bottom * patch, one.left * patch : one.right * patch],
                (rows * patch, columns * patch),
            )
            for one in views.windows
        ]
        made = tower(torch.cat(small), output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        layers = [made[index + 1][:, self.skip :] for index in self._feature_layers(len(tower.encoder.layers))]
        return self.project(torch.cat(layers, dim=-1)).mT.unflatten(-1, (rows, columns))

    def _tiles(self, inputs: Mapping[str, Any]) -> Tensor:
        """The images and tiles that the tower gets [T, 3, H, W], without the padding of the batch."""
        pixels = inputs["pixel_values"]
        if pixels.ndim == 4:
            return pixels
        return torch.cat([own[: 1 + math.prod(n)] for own, n in zip(pixels, self.tiling(inputs), strict=True)])

    def outline(self, sizes: Sequence[Size]) -> ImageOutline:
        """The whole image and its tiles, packed as the model packs them; see `Family.outline`."""
        given = {"image_sizes": torch.tensor(sizes).reshape(-1, 2), "batch_num_images": torch.tensor([len(sizes)])}
        count = int(self.view_tokens or 0)
        side = math.isqrt(count)
        images, views, total = [], [], 0
        for index, (size, tiling) in enumerate(zip(given["image_sizes"], self.tiling(given), strict=True)):
            tiles = blank_tokens(1 + math.prod(tiling), count, (side, side))
            features = self.pack(tiles.projected, size, torch.zeros(1))
            image, own = self._image(tiles, features, size, tiling, (index, total))
            images.append(image)
            views += own
            total += tiles.batch
        return self._outlined(EncodedImages(images, Views.grouped(views)), total)

    def _image(
        self, tiles: VisionTokens, features: Tensor, size: Tensor, tiling: tuple[int, int], place: tuple[int, int]
    ) -> tuple[EncodedImage, list[Views]]:
        """Assemble one image and its views.

        Args:
            tiles: the tokens of the scaled-down whole image and of the tiles, one row each.
            features: [L, D] the model's packed features.
            size: height and width of the image in pixels.
            tiling: rows and columns of tiles.
            place: index of the image in the call, and of the first of `tiles` among those of all images.
        """
        owner, first = place
        blank = tiles.projected.new_zeros(tiles.batch, tiles.count, 1)
        separators = self.pack(blank, size, blank.new_ones(1))[:, 0] > 0.5
        rows = torch.full_like(separators, WHOLE, dtype=torch.long)
        whole, side = torch.arange(tiles.count, device=features.device), math.isqrt(tiles.count)
        views = [Views(tiles[0], [owner], whole[None], (Window(first, 0, side, 0, side),))]
        lines = int(separators.sum())
        if not math.prod(tiling) or not lines:  # the padding of a very slim image leaves no line of its tiles
            return EncodedImage(features, separators, rows), views
        width = (len(features) - tiles.count) // lines
        canvas = torch.arange(tiles.count, len(features), device=features.device).view(lines, width)
        rows[tiles.count :] = torch.arange(lines, device=features.device).repeat_interleave(width)
        # Pack indices instead of features, without shrinking: the first one tells how much padding was cut off at the
        # top and on the left.
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
                continue  # the tile holds nothing but padding
            places = canvas[down][:, along].flatten()
            own = {name: getattr(tiles, name) for name in ("cls_token", "image_ids")}
            own = {name: value[index + 1 : index + 2] for name, value in own.items() if value is not None}
            tokens = VisionTokens(**packed, **own, heads=tiles.heads).take(places, (len(down), len(along)))
            above, beside = top - index // tiling[1] * side, left - index % tiling[1] * side
            window = Window(
                first + 1 + index,
                *(max(above, 0), min(above + shape[0], side)),
                *(max(beside, 0), min(beside + shape[1] - 1, side)),
            )
            views.append(Views(tokens, [owner], places[None], (window,)))
        return EncodedImage(features, separators, rows), views

    def _packed(
        self, tiles: VisionTokens, features: Tensor, size: Tensor, shrunk: bool, source: Tensor
    ) -> dict[str, Any]:
        """Every field with values per token as one sequence [1, L, ...], in the order of the features.

        Args:
            tiles: the tokens of the scaled-down whole image and of the tiles.
            features: [L, D] the packed features.
            size: height and width of the image in pixels.
            shrunk: whether the model resampled the patches of this image.
            source: for each place after the whole image, the index of its patch; negative for a new line.
        """
        packed = {"projected": features[None]}
        whole = torch.arange(tiles.count, device=source.device)
        index = torch.cat([whole, source.clamp(min=0)])  # any value will do for new lines, which no view contains
        for name in per_token():
            value = getattr(tiles, name)
            if value is None or name == "projected":
                continue
            wide = value if value.ndim == 3 else value.unsqueeze(-1)
            laid = self.pack(wide, size, wide.new_zeros(wide.shape[-1])) if shrunk else wide.flatten(0, 1)[index]
            packed[name] = laid[None] if value.ndim == 3 else laid[None, :, 0]
        return packed

    def _tile_of(self, count: int, full: int, offset: int, side: int) -> Tensor:
        """The row of tiles in which the centre of each line lies: [count].

        The same function gives the column of tiles for each place in a line.

        Args:
            count: number of lines after shrinking.
            full: number of lines before shrinking.
            offset: lines of padding that were cut off in front.
            side: lines per tile.
        """
        centre = (torch.arange(count) + 0.5) * full / count
        return ((centre + offset) // side).long()
