"""InternVL3: tiles and a thumbnail, 2 x 2 patches shuffled into one token."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from qapbench.errors import UserError
from qapbench.tokens import VisionTokens

from .family import TINY_TEXT, TINY_TOWER, Family, family
from .tower import MIDDLE, cls_row, digest, received, recorded
from .views import Seen, SeenImage, Views


@family("internvl")
class InternVL(Family):
    """Every tile is pruned by itself, the thumbnail (the last one, where there are several) as well.

    A token is four patches side by side, which is what `patches` holds; its attention and its keys are the mean over
    these. The CLS token has a quarter of that width and does not fit the projector, so it is not offered.
    """

    processor_class = "InternVLProcessor"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if model.config.vision_feature_select_strategy != "default":
            raise UserError("model: only vision_feature_select_strategy='default' (CLS dropped) is supported")

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        core = self.model.model
        return {
            "language": core.language_model, "projector": core.multi_modal_projector, "vision": core.vision_tower,
        }  # fmt: skip

    @property
    def offers(self) -> frozenset[str]:
        fields = {"patches", "image_ids", "grid", "cls_attention", "keys", "last_cls_attention", "last_keys"}
        return frozenset(fields | {"attention_received", "middle_attention_received"})

    @property
    def view_tokens(self) -> int | None:
        vision = self.model.config.vision_config
        sides = [
            int(s // p * self.model.config.downsample_ratio)
            for s, p in zip(vision.image_size, vision.patch_size, strict=True)
        ]
        return sides[0] * sides[1]

    def project(self, patches: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(patches)

    def encoded(self, features: list[Tensor]) -> dict[str, Any]:
        # This model wants one tensor, where its relatives take a list.
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=torch.cat(features))}}

    @torch.no_grad()
    def look(self, inputs: Mapping[str, Any], needs: frozenset[str]) -> Seen:
        self.check_offered(needs)
        core, pixels = self.model.model, inputs["pixel_values"]
        layers = core.vision_tower.encoder.layer
        chosen = core.config.vision_feature_layer
        used = {
            "": layers[(chosen if chosen >= 0 else len(layers) + 1 + chosen) - 1], "last_": layers[-1],
            "middle_": layers[max(round(len(layers) * MIDDLE), 1) - 1],
        }  # fmt: skip
        outputs = [
            (getattr(layer.attention, f"{kind}_norm"), f"{prefix}{kind}")
            for prefix, layer in used.items()
            for kind in "qk"
        ]
        with recorded(outputs, {core.multi_modal_projector: "patches"}) as seen:
            projected = core.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        tokens = VisionTokens(projected=projected, **self._fields(seen, needs, pixels))
        counts = self._tiles(inputs["input_ids"], tokens)
        owners = [image for image, count in enumerate(counts) for _ in range(count)]
        within = [tile for count in counts for tile in range(count)]
        places = torch.arange(tokens.count) + torch.tensor(within).unsqueeze(1) * tokens.count
        images = [SeenImage(part.flatten(0, 1)) for part in projected.split(counts)]
        return Seen(images, [Views(tokens, owners, places.to(projected.device))])

    def _tiles(self, ids: Tensor, tokens: VisionTokens) -> list[int]:
        """Tiles of each image: the pixels do not say, but in the prompt every image is an unbroken run."""
        lengths = [
            sum(1 for _ in run)
            for row in (ids == self.image_token).tolist()
            for is_image, run in itertools.groupby(row)
            if is_image
        ]
        if any(length % tokens.count for length in lengths) or sum(lengths) != tokens.batch * tokens.count:
            raise UserError(
                f"input_ids hold runs of {lengths} image placeholders, but {tokens.batch} tile(s) of {tokens.count} "
                "tokens were given"
            )
        return [length // tokens.count for length in lengths]

    def _fields(self, seen: Mapping[str, Tensor], needs: frozenset[str], pixels: Tensor) -> dict[str, Any]:
        heads = self.model.config.vision_config.num_attention_heads
        found: dict[str, Any] = {}
        attention = {
            "cls_attention": (cls_row, "", heads), "last_cls_attention": (cls_row, "last_", 1),
            "attention_received": (received, "", heads), "middle_attention_received": (received, "middle_", heads),
        }  # fmt: skip
        for name in attention.keys() & needs:
            look, prefix, parts = attention[name]
            found[name] = self._merged(look(seen[f"{prefix}q"], seen[f"{prefix}k"], parts)[..., None])[..., 0]
        if "patches" in needs:
            found["patches"] = seen["patches"]
        if "keys" in needs:
            found |= {"keys": self._merged(seen["k"]), "heads": heads}
        if "last_keys" in needs:
            found["last_keys"] = self._merged(seen["last_k"])
        if "image_ids" in needs:
            found["image_ids"] = tuple(digest(tile) for tile in pixels)
        vision = self.model.config.vision_config
        ratio = self.model.config.downsample_ratio
        found["grid"] = tuple(int(s // p * ratio) for s, p in zip(vision.image_size, vision.patch_size, strict=True))
        return found

    def _merged(self, values: Tensor) -> Tensor:
        """[T, 1 + P, C] of CLS and patches -> [T, N, C]: the mean over the patches of each token."""
        side = int((values.shape[1] - 1) ** 0.5)
        square = values[:, 1:].unflatten(1, (side, side))
        shuffled = self.model.model.pixel_shuffle(square, scale_factor=self.model.config.downsample_ratio)
        return shuffled.flatten(1, 2).unflatten(-1, (-1, values.shape[-1])).mean(dim=-2)

    @classmethod
    def tiny(cls) -> tuple[Any, dict[str, Any]]:
        from transformers import InternVLConfig, InternVLForConditionalGeneration

        vision = {**TINY_TOWER, "image_size": [32, 32], "patch_size": [4, 4], "use_qk_norm": False}
        text = {**TINY_TEXT, "model_type": "qwen2"}
        config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=3, image_seq_length=16)
        model = InternVLForConditionalGeneration(config).eval()
        ids = torch.tensor([[1, 9, 5, *[3] * 48, 6, 8, 7]])  # two tiles and their thumbnail
        return model, {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.rand(3, 3, 32, 32),
        }  # fmt: skip
