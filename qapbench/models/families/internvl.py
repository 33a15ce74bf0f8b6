"""InternVL3: an image as tiles and a thumbnail, with 2 x 2 patches merged into one token by pixel shuffle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qapbench.errors import UserError
from qapbench.methods.tokens import VisionTokens
from qapbench.models.encoded import EncodedImages, Views
from qapbench.models.family import TINY_TEXT, TINY_TOWER, Family, family
from qapbench.models.merged_patches import check_runs, joined, runs, tiled, tiled_outline
from qapbench.models.outline import ImageOutline, Size
from qapbench.models.tower import MIDDLE, SHALLOW, at_depth, cls_row, digest, received, recorded, scaled

TILES = 12  # largest number of tiles that the processor cuts an image into, unless its config says otherwise


@family("internvl")
class InternVL(Family):
    """Every tile is a view, and so is the thumbnail, which comes last if there are several tiles.

    A token consists of four patches side by side, which is what `patches` holds. Its attention and its keys are the
    means over these patches. The CLS token has a quarter of that width and does not fit the projector, so `cls_token`
    is not available.

    Raises:
        UserError: the model keeps the CLS token among its features.
    """

    processor_class = "InternVLProcessor"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if model.config.vision_feature_select_strategy != "default":
            raise UserError("model: only vision_feature_select_strategy='default' (CLS dropped) is supported")

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """The language model, the projector and the vision tower."""
        core = self.model.model
        return {
            "language": core.language_model,
            "projector": core.multi_modal_projector,
            "vision": core.vision_tower,
        }

    @property
    def available_fields(self) -> frozenset[str]:
        """All fields of the vision tower except `cls_token`."""
        fields = {"patches", "image_ids", "grid", "cls_attention", "keys", "last_cls_attention", "last_keys"}
        fields |= {"attention_received", "middle_attention_received", "shallow_cls_attention"}
        return frozenset(fields | {"downsampled"})

    @property
    def view_tokens(self) -> int | None:
        """Number of tokens of a tile."""
        vision = self.model.config.vision_config
        sides = [
            int(s // p * self.model.config.downsample_ratio)
            for s, p in zip(vision.image_size, vision.patch_size, strict=True)
        ]
        return sides[0] * sides[1]

    def project(self, patches: Tensor) -> Tensor:
        """Apply the projector to merged patches [B, M, C]: [B, M, D]."""
        return self.model.model.multi_modal_projector(patches)

    def encoded(self, features: list[Tensor]) -> dict[str, Any]:
        """Keyword arguments that hand the features [K, D] of each image to the model in place of pixels."""
        return joined(features)

    @torch.no_grad()
    def encode_images(self, inputs: Mapping[str, Any], needs: frozenset[str]) -> EncodedImages:
        """Run vision tower and projector on all tiles of the call at once; see `Family.encode_images`."""
        self.check_available(needs)
        core, pixels = self.model.model, inputs["pixel_values"]
        layers = core.vision_tower.encoder.layer
        chosen = core.config.vision_feature_layer
        used = {
            "": layers[(chosen if chosen >= 0 else len(layers) + 1 + chosen) - 1],
            "last_": layers[-1],
            "middle_": at_depth(layers, MIDDLE),
            "shallow_": at_depth(layers, SHALLOW),
        }
        outputs = [
            (getattr(layer.attention, f"{kind}_norm"), f"{prefix}{kind}")
            for prefix, layer in used.items()
            for kind in "qk"
        ]
        with recorded(outputs, {core.multi_modal_projector: "patches"}) as captured:
            projected = core.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        tokens = VisionTokens(projected=projected, **self._fields(captured, needs, pixels))
        lengths = [end - start for _, start, end in runs(inputs["input_ids"], self.image_token)]
        check_runs(lengths, tokens)  # nothing in the pixels tells tiles of one image from those of another
        return tiled(tokens, [length // tokens.count for length in lengths])

    def outline(self, sizes: Sequence[Size]) -> ImageOutline:
        """Up to twelve tiles of nearly the image's shape, and a thumbnail; see `Family.outline`."""
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        vision = self.model.config.vision_config
        tilings = [get_optimal_tiled_canvas(size, tuple(vision.image_size), 1, TILES) for size in sizes]
        counts = [columns * rows + (columns * rows > 1) for columns, rows in tilings]
        patches = math.prod(s // p for s, p in zip(vision.image_size, vision.patch_size, strict=True))
        lengths = (patches + 1,) * vision.num_hidden_layers  # and the CLS token
        return tiled_outline(counts, int(self.view_tokens or 0), patches, lengths)

    @torch.no_grad()
    def downsampled(self, inputs: Mapping[str, Any], count: int, views: Views) -> Tensor:
        """The tiles at a lower size, square, with position embeddings interpolated; see `Family.downsampled`."""
        config = self.model.config
        side = math.ceil(math.sqrt(count))
        patches = round(side / config.downsample_ratio)
        height, width = (patches * size for size in config.vision_config.patch_size)
        small = scaled(inputs["pixel_values"], (height, width))
        made = self.model.model.get_image_features(pixel_values=small, return_dict=True).pooler_output
        return made.mT.unflatten(-1, (side, side))

    def _fields(self, seen: Mapping[str, Tensor], needs: frozenset[str], pixels: Tensor) -> dict[str, Any]:
        """Make the fields of `VisionTokens` other than `projected` from captured queries, keys and patches."""
        heads = self.model.config.vision_config.num_attention_heads
        found: dict[str, Any] = {"heads": heads}
        attention = {
            "cls_attention": (cls_row, "", heads),
            "last_cls_attention": (cls_row, "last_", 1),
            "attention_received": (received, "", heads),
            "middle_attention_received": (received, "middle_", heads),
            "shallow_cls_attention": (cls_row, "shallow_", heads),
        }
        for name in attention.keys() & needs:
            measure, prefix, parts = attention[name]
            found[name] = self._merged(measure(seen[f"{prefix}q"], seen[f"{prefix}k"], parts)[..., None])[..., 0]
        if "patches" in needs:
            found["patches"] = seen["patches"]
        if "keys" in needs:
            found["keys"] = self._merged(seen["k"])
        if "last_keys" in needs:
            found["last_keys"] = self._merged(seen["last_k"])
        if "image_ids" in needs:
            found["image_ids"] = tuple(digest(tile) for tile in pixels)
        vision = self.model.config.vision_config
        ratio = self.model.config.downsample_ratio
        found["grid"] = tuple(int(s // p * ratio) for s, p in zip(vision.image_size, vision.patch_size, strict=True))
        return found

    def _merged(self, values: Tensor) -> Tensor:
        """The mean over the patches of each token: [T, 1 + P, C] of CLS and patches -> [T, N, C]."""
        side = int((values.shape[1] - 1) ** 0.5)
        square = values[:, 1:].unflatten(1, (side, side))
        shuffled = self.model.model.pixel_shuffle(square, scale_factor=self.model.config.downsample_ratio)
        return shuffled.flatten(1, 2).unflatten(-1, (-1, values.shape[-1])).mean(dim=-2)

    @classmethod
    def tiny(cls) -> tuple[Any, dict[str, Any]]:
        """A random vision tower and Qwen2, and one prompt with an image of two tiles and a thumbnail."""
        from transformers import InternVLConfig, InternVLForConditionalGeneration

        vision = {**TINY_TOWER, "image_size": [32, 32], "patch_size": [4, 4], "use_qk_norm": False}
        text = {**TINY_TEXT, "model_type": "qwen2"}
        config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=3, image_seq_length=16)
        model = InternVLForConditionalGeneration(config).eval()
        ids = torch.tensor([[1, 9, 5, *[3] * 48, 6, 8, 7]])  # two tiles and a thumbnail, 16 tokens each
        return model, {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.rand(3, 3, 32, 32),
        }
