"""Gemma 3: a SigLIP tower with its patches pooled, and a decoder in which the tokens of an image see each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qapbench.methods.tokens import VisionTokens
from qapbench.models.encoded import EncodedImages, Views
from qapbench.models.family import TINY_TEXT, TINY_TOWER, family
from qapbench.models.merged_patches import MergedFamily, joined
from qapbench.models.tower import scaled, smaller_grid


@family("gemma3")
class Gemma3(MergedFamily):
    """One square view per image; of an image cut by pan and scan, each crop counts as an image.

    See `MergedFamily`. A token is the mean of a square of patches, which is what `patches` holds. The decoder's mask
    follows from `token_type_ids`, which are cut with the prompt: the tokens that are left of an image see each other.
    The projector is a norm and a matrix that is no linear layer, so it is not quantized.
    """

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
    def layers(self) -> Sequence[Any]:
        """The layers of the vision tower."""
        return self.model.model.vision_tower.encoder.layers

    @property
    def merging(self) -> nn.Module:
        """The norm of pooled patches."""
        return self.model.model.multi_modal_projector.mm_soft_emb_norm

    @property
    def view_tokens(self) -> int | None:
        """Number of tokens of an image."""
        return self.model.config.mm_tokens_per_image

    def merged(self, values: Tensor) -> Tensor:
        """The mean over the patches of each token: [T, P, C] -> [T, N, C]."""
        projector = self.model.model.multi_modal_projector
        side = projector.patches_per_image
        return projector.avg_pool(values.mT.unflatten(-1, (side, side))).flatten(2).mT

    def project(self, patches: Tensor) -> Tensor:
        """Apply norm and projection to pooled patches [B, M, C]: [B, M, D]."""
        return self.merging(patches) @ self.model.model.multi_modal_projector.mm_input_projection_weight

    def encoded(self, features: list[Tensor]) -> dict[str, Any]:
        """Keyword arguments that hand the features [K, D] of each image to the model in place of pixels."""
        return joined(features)

    @torch.no_grad()
    def encode_images(self, inputs: Mapping[str, Any], needs: frozenset[str]) -> EncodedImages:
        """Run vision tower and projector on all images of the call at once; see `Family.encode_images`."""
        pixels = inputs["pixel_values"]
        with self.recording(needs, {}) as captured:
            projected = self.model.model.get_image_features(pixels, return_dict=True).pooler_output
        return EncodedImages.whole(VisionTokens(projected=projected, **self.fields(captured, needs, pixels)))

    @torch.no_grad()
    def downsampled(self, inputs: Mapping[str, Any], count: int, views: Views) -> Tensor:
        """The images at a lower size, with position embeddings interpolated; see `Family.downsampled`."""
        core, vision = self.model.model, self.model.config.vision_config
        grid = views.tokens.grid or (1, views.tokens.count)
        rows, columns = smaller_grid(grid, count)
        pool = core.multi_modal_projector.avg_pool
        unit = vision.patch_size * core.multi_modal_projector.kernel_size
        small = scaled(inputs["pixel_values"][views.owners], (rows * unit, columns * unit))
        patches = core.vision_tower(small, interpolate_pos_encoding=True, return_dict=True).last_hidden_state
        pooled = pool(patches.mT.unflatten(-1, (small.shape[-2] // vision.patch_size, -1)))
        return self.project(pooled.flatten(2).mT).mT.unflatten(-1, (rows, -1))

    @classmethod
    def tiny(cls) -> tuple[Any, dict[str, Any]]:
        """A random SigLIP and Gemma 3, and one prompt with an image of 4 x 4 tokens."""
        from transformers import Gemma3Config, Gemma3ForConditionalGeneration

        text = {
            **TINY_TEXT,
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": 256,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        }
        config = Gemma3Config(
            vision_config={**TINY_TOWER, "patch_size": 4, "vision_use_head": False},  # as in the checkpoints
            text_config=text,
            mm_tokens_per_image=16,
            boi_token_index=5,
            eoi_token_index=6,
            image_token_index=3,
        )
        model = Gemma3ForConditionalGeneration(config).eval()
        nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.1)  # it begins as zeros
        ids = torch.tensor([[1, 9, 5, *[3] * 16, 6, 8, 7]])
        return model, {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": (ids == 3).long(),
            "pixel_values": torch.rand(1, 3, 32, 32),
        }
