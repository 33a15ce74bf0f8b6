"""Idefics3 and the first SmolVLM: an image as tiles and itself scaled down, with squares of patches in one token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qapbench.methods.tokens import VisionTokens
from qapbench.models.encoded import EncodedImages, Views
from qapbench.models.family import TINY_TEXT, TINY_TOWER, family
from qapbench.models.merged_patches import MergedFamily, check_runs, runs, tiled
from qapbench.models.outline import Size
from qapbench.models.tower import scaled


@family("idefics3")
class Idefics3(MergedFamily):
    """Every tile is a view, and so is the image scaled down, which comes last if there are tiles.

    See `MergedFamily`. A token consists of a square of patches side by side, which is what `patches` holds.
    """

    image_inputs = ("pixel_values", "pixel_attention_mask")
    processor_class = "Idefics3Processor"
    longest_edge: ClassVar[int] = 4
    """Length in tiles to which the processor scales the longer edge of an image, unless its config says otherwise."""

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """The language model, the connector (as projector) and the vision tower."""
        core = self.model.model
        return {"language": core.text_model, "projector": core.connector, "vision": core.vision_model}

    @property
    def layers(self) -> Sequence[Any]:
        """The layers of the vision tower."""
        return self.model.model.vision_model.encoder.layers

    @property
    def merging(self) -> nn.Module:
        """The projection of shuffled patches."""
        return self.model.model.connector.modality_projection

    @property
    def view_tokens(self) -> int | None:
        """Number of tokens of a tile."""
        return self.model.model.image_seq_len

    def project(self, patches: Tensor) -> Tensor:
        """Apply the projection to shuffled patches [B, M, C]: [B, M, D]."""
        return self.model.model.connector.modality_projection(patches)

    def views_of(self, size: Size) -> int:
        """The tiles of the image and itself scaled down."""
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

        side = self.model.config.vision_config.image_size
        scaled = {"size": {"longest_edge": self.longest_edge * side}, "max_image_size": {"longest_edge": side}}
        return Idefics3ImageProcessorPil().get_number_of_image_patches(*size, scaled)[0]

    @torch.no_grad()
    def encode_images(self, inputs: Mapping[str, Any], needs: frozenset[str]) -> EncodedImages:
        """Run vision tower and connector on all tiles of the call at once; see `Family.encode_images`."""
        core = self.model.model
        with self.recording(needs, {core.vision_model: "tower"}) as captured:
            rows = core.get_image_features(
                inputs["pixel_values"], inputs.get("pixel_attention_mask"), return_dict=True
            ).pooler_output
        pixels = captured["tower"]["pixel_values"]  # those of the call without the tiles that fill up its rows
        projected = torch.cat(rows).unflatten(0, (len(pixels), -1))
        tokens = VisionTokens(projected=projected, **self.fields(captured, needs, pixels))
        return tiled(tokens, self._tiles(inputs["input_ids"], tokens))

    @torch.no_grad()
    def downsampled(self, inputs: Mapping[str, Any], count: int, views: Views) -> Tensor:
        """The tiles at a lower size, square as they are; see `Family.downsampled`.

        The tower finds the place of a patch by where in the tile it is, whatever the tile's size.
        """
        core, side = self.model.model, math.ceil(math.sqrt(count))
        pixels = inputs["pixel_values"].flatten(0, 1)
        pixels = pixels[(pixels != 0).flatten(1).any(dim=1)]  # without the tiles that fill up the rows of the call
        small = scaled(pixels, (side * core.connector.scale_factor * self.model.config.vision_config.patch_size,) * 2)
        made = core.connector(core.vision_model(pixel_values=small, return_dict=True).last_hidden_state)
        return made.mT.unflatten(-1, (side, side))

    def _tiles(self, ids: Tensor, tokens: VisionTokens) -> list[int]:
        """Number of tiles of each image.

        In a prompt every tile opens with a mark and a token that names its place, and an image closes with the mark.
        Between two tiles of an image there is thus one mark, and between two images there are two.

        Args:
            ids: [B, L] token ids.
            tokens: the tiles.
        """
        spans = runs(ids, self.image_token)
        check_runs([end - start for _, start, end in spans], tokens)
        counts: list[int] = []
        last: tuple[int, int] | None = None
        for row, start, end in spans:
            mark = ids[row, max(start - 2, 0)]
            same = last is not None and last[0] == row and int((ids[row, last[1] : start] == mark).sum()) == 1
            if same:
                counts[-1] += (end - start) // tokens.count
            else:
                counts.append((end - start) // tokens.count)
            last = row, end
        return counts

    def merged(self, values: Tensor) -> Tensor:
        """The mean over the patches of each token: [T, P, C] -> [T, N, C]."""
        connector = self.model.model.connector
        shuffled = connector.pixel_shuffle(values, connector.scale_factor)
        return shuffled.unflatten(-1, (-1, values.shape[-1])).mean(dim=-2)

    @classmethod
    def tiny(cls) -> tuple[Any, dict[str, Any]]:
        """A random vision tower and Llama, and one prompt with an image of two tiles and itself scaled down."""
        from transformers import Idefics3Config, Idefics3ForConditionalGeneration

        return cls.made(Idefics3Config, Idefics3ForConditionalGeneration)

    @classmethod
    def made(cls, config: Any, model: Any) -> tuple[Any, dict[str, Any]]:
        """A random model of a class, and one call's inputs.

        Args:
            config: class of the model's config.
            model: class of the model.
        """
        text = {**TINY_TEXT, "model_type": "llama"}
        made = config(vision_config={**TINY_TOWER, "patch_size": 4}, text_config=text, image_token_id=3, scale_factor=2)
        tiles = [[4, place, *[3] * 16] for place in (10, 11, 12)]  # a mark, where the tile is, 16 tokens
        ids = torch.tensor([[1, 9, *tiles[0], *tiles[1], 13, *tiles[2], 4, 8, 7]])
        return model(made).eval(), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.rand(1, 3, 3, 32, 32),
            "pixel_attention_mask": torch.ones(1, 3, 32, 32, dtype=torch.long),
        }
