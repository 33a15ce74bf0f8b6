"""Families of Qwen's build: images at their own resolution, a merger of 2 x 2 patches, M-RoPE positions."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qapbench.errors import UserError
from qapbench.methods.tokens import VisionTokens

from .encoded import EncodedImage, EncodedImages, Views
from .family import TINY_TEXT, Family
from .outline import ImageOutline, Size, blank_tokens, each_alone
from .tower import MIDDLE, OF_CLS, RECEIVED, SHALLOW, at_depth, digest, received, recorded, scaled, smaller_grid

MOST_TOKENS = 16384  # of an image, unless the processor's config says otherwise
QUERIES = 512  # rows of an attention map held in memory at once: an image has up to 16,384 patches
ATTENTION: Mapping[str, str] = {
    "attention_received": "full",
    "cls_attention": "full",
    "last_cls_attention": "full",
    "middle_attention_received": "middle",
    "shallow_cls_attention": "shallow",
}
"""Fields of attention -> which block's attention they hold, of those in `attending`."""
TINY_VISION: Mapping[str, Any] = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "out_hidden_size": 48,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}


class QwenFamily(Family):
    """One view per image. A token is what the merger makes of 2 x 2 patches.

    `patches` holds the input of the merger's first linear, four patches side by side, so `project` is the rest of the
    merger. A token's attention and keys are the means over its patches. Attention received also takes the place of CLS
    attention, because the tower has no CLS token. Kept tokens and text keep their M-RoPE positions, whether
    `prune.positions` in the spec is "compact" or "keep".
    """

    image_inputs = ("pixel_values", "image_grid_thw")
    least_tokens: ClassVar[int] = 4
    """Least number of tokens that the processor gives an image, unless its config says otherwise."""

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """The language model, the merger (as projector) and the blocks of the vision tower."""
        core = self.model.model
        return {"language": core.language_model, "projector": core.visual.merger, "vision": core.visual.blocks}

    @property
    def available_fields(self) -> frozenset[str]:
        """All fields but `cls_token`, and the image at a lower size.

        Those of attention need a block with full attention.
        """
        fields = frozenset({"patches", "image_ids", "grid", "keys", "last_keys", "downsampled"})
        return fields | ATTENTION.keys() if self.attending else fields

    @property
    def substitutes(self) -> Mapping[str, str]:
        """Attention received from all patches takes the place of CLS attention."""
        return dict.fromkeys(OF_CLS, RECEIVED)

    @property
    @abc.abstractmethod
    def attending(self) -> Mapping[str, int]:
        """Indices of the blocks that `ATTENTION` names, in which every patch of an image attends to every other.

        Empty if no block does.
        """

    @property
    @abc.abstractmethod
    def merging(self) -> nn.Module:
        """The module whose input `patches` holds, side by side as the merger puts them."""

    def raster(self, grids: Tensor) -> Tensor | None:
        """[M] the place, in the tower's order of the M tokens of all images, of each token in raster order.

        None if the tower keeps raster order.

        Args:
            grids: [I, 3] frames, height and width of the images in patches.
        """
        return None

    @property
    def _merge(self) -> int:
        """Side of the square of patches that the merger joins into one token."""
        return self.model.model.visual.spatial_merge_size

    def positions(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """M-RoPE position ids of the whole prompt: those of the caller, or [3, B, T] as the model computes them."""
        if (given := inputs.get("position_ids")) is not None:
            return given
        types = inputs.get("mm_token_type_ids")
        if types is None:
            types = (inputs["input_ids"] == self.image_token).long()
        grids, mask = inputs["image_grid_thw"], inputs["attention_mask"]
        return self.model.model.get_rope_index(
            inputs["input_ids"], mm_token_type_ids=types, image_grid_thw=grids, attention_mask=mask
        )[0]

    @property
    def tower(self) -> nn.Module:
        """The whole tower, merger included."""
        return self.model.model.visual

    def outline(self, sizes: Sequence[Size]) -> ImageOutline:
        """Images at their own resolution, rounded to whole tokens; see `Family.outline`."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        patch, merge = self.model.model.visual.patch_size, self._merge
        side = patch * merge
        limits = self.least_tokens * side**2, MOST_TOKENS * side**2
        resized = [smart_resize(height, width, side, *limits) for height, width in sizes]
        grids = torch.tensor([[1, height // patch, width // patch] for height, width in resized])
        tokens = [
            blank_tokens(1, height * width // merge**2, (height // merge, width // merge))
            for _, height, width in grids.tolist()
        ]
        encoded = EncodedImages([EncodedImage(one.projected[0]) for one in tokens], each_alone(tokens))
        patches = int(grids.prod(dim=-1).sum())
        return ImageOutline(encoded, tuple(map(tuple, self.attended(grids))), patches, patches // merge**2)

    def attended(self, grids: Tensor) -> list[Sequence[int]]:
        """For each block, the lengths of the sequences within which it attends: here the patches of each image.

        Args:
            grids: [I, 3] frames, height and width of the images in patches.
        """
        return [grids.prod(dim=-1).tolist()] * len(self.model.model.visual.blocks)

    @torch.no_grad()
    def encode_images(self, inputs: Mapping[str, Any], needs: frozenset[str]) -> EncodedImages:
        """Run vision tower and merger on all images of the call at once; see `Family.encode_images`."""
        pixels, grids = inputs["pixel_values"], inputs.get("image_grid_thw")
        if grids is None:
            raise UserError("image_grid_thw: needed beside pixel_values; the processor gives both")
        with self._recording(needs) as captured:
            output = self.model.model.get_image_features(pixels, grids, return_dict=True)
        fields = self._fields(captured, needs, grids)
        heads = self.model.config.vision_config.num_heads
        views, start, unit = [], 0, self._merge**2
        for index, (feature, (frames, height, width)) in enumerate(
            zip(output.pooler_output, grids.tolist(), strict=True)
        ):
            stop = start + len(feature)
            own: dict[str, Any] = {name: value[None, start:stop] for name, value in fields.items()}
            if "image_ids" in needs:
                own["image_ids"] = (digest(pixels[start * unit : stop * unit]),)
            grid = (frames * height // self._merge, width // self._merge)
            tokens = VisionTokens(projected=feature[None], grid=grid, heads=heads, **own)
            views.append(Views(tokens, [index], torch.arange(len(feature), device=feature.device)[None]))
            start = stop
        return EncodedImages([EncodedImage(one) for one in self.handed(output)], Views.grouped(views))

    @torch.no_grad()
    def downsampled(self, inputs: Mapping[str, Any], count: int, views: Views) -> Tensor:
        """The images at a lower size, as the processor would cut them into patches; see `Family.downsampled`."""
        grids, visual = inputs["image_grid_thw"], self.model.model.visual
        unit = self._merge, visual.patch_size
        lengths = grids.prod(dim=-1).tolist()
        own = [inputs["pixel_values"].split(lengths)[owner] for owner in views.owners]
        _, height, width = grids[views.owners[0]].tolist()
        rows, columns = smaller_grid((height // self._merge, width // self._merge), count)
        channels = self.model.config.vision_config.in_channels
        frames = torch.stack([unpatched(one, (height, width), channels, *unit) for one in own])
        small = scaled(frames, (rows * self._merge * visual.patch_size, columns * self._merge * visual.patch_size))
        patches = torch.cat([patched(one, channels, *unit) for one in small])
        grid = grids.new_tensor([[1, rows * self._merge, columns * self._merge]]).expand(len(own), -1)
        made = self.model.model.get_image_features(patches, grid, return_dict=True).pooler_output
        return torch.stack(list(made)).mT.unflatten(-1, (rows, columns))

    def handed(self, output: Any) -> list[Tensor]:
        """What the language model gets of each image, one row per token.

        Args:
            output: that of the model's `get_image_features`.
        """
        return list(output.pooler_output)

    @classmethod
    def made(
        cls, config: Any, model: Any, vision: Mapping[str, Any], text: Mapping[str, Any], rope: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """A random model of a class, and one prompt with an image of 8 x 10 patches, which are 4 x 5 tokens.

        Args:
            config: class of the model's config.
            model: class of the model.
            vision: keywords of the tower's config beside the common ones.
            text: keywords of the decoder's config beside the common ones.
            rope: keywords of its rotary embedding beside the common ones.
        """
        turning = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2], **rope}
        made = config(
            vision_config={**TINY_VISION, **vision},
            text_config={**TINY_TEXT, **text, "rope_parameters": turning},
            image_token_id=3,
            video_token_id=4,
            vision_start_token_id=5,
            vision_end_token_id=6,
        )
        ids = torch.tensor([[1, 9, 5, *[3] * 20, 6, 8, 7]])
        return model(made).eval(), {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == 3).long(),
            "pixel_values": torch.rand(80, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 8, 10]]),
        }

    @contextlib.contextmanager
    def _recording(self, needs: frozenset[str]) -> Iterator[dict[str, Any]]:
        """Capture the tensors that the fields in `needs` are made from, while the context is open.

        These are the queries, keys and values of the blocks concerned (`last`, and those of `attending`), the rotary
        embedding that is applied to them (in `call`), and the patches that are merged (`patches`).
        """
        self.check_available(needs)
        visual = self.model.model.visual
        last, blocks = len(visual.blocks) - 1, {}
        if needs & {"keys", "last_keys"}:
            blocks["last"] = last
        blocks |= {which: self.attending[which] for name, which in ATTENTION.items() if name in needs}
        outputs = [(visual.blocks[at].attn.qkv, name) for name, at in blocks.items()]
        inputs = {self.merging: "patches"} if "patches" in needs else {}
        with recorded(outputs, inputs, {visual.blocks[last].attn: "call"}) as captured:
            yield captured

    def _fields(self, seen: Mapping[str, Any], needs: frozenset[str], grids: Tensor) -> dict[str, Tensor]:
        """Make fields [M, ...] of the M tokens of all images, in raster order."""
        visual, heads = self.model.model.visual, self.model.config.vision_config.num_heads
        raster, sizes = self.raster(grids), grids.prod(dim=-1).tolist()

        def ordered(values: Tensor) -> Tensor:
            return values if raster is None else values[raster]

        def merged(values: Tensor) -> Tensor:
            return ordered(values.unflatten(0, (-1, self._merge**2)).mean(dim=1))

        def attention(name: str, heads: int) -> Tensor:
            query, key, _ = seen[name].unflatten(-1, (3, -1)).unbind(dim=1)
            query, key = (_rotated(x, seen["call"]["position_embeddings"], visual.blocks[0].attn) for x in (query, key))
            images = zip(query.split(sizes), key.split(sizes), strict=True)
            return merged(torch.cat([_received(q, k, heads) for q, k in images]))

        found = {}
        if "patches" in needs:
            found["patches"] = ordered(seen["patches"])
        for name in needs & {"keys", "last_keys"}:
            found[name] = merged(seen["last"].unflatten(-1, (3, -1))[:, 1])
        for name in ATTENTION.keys() & needs:
            found[name] = attention(ATTENTION[name], 1 if name == "last_cls_attention" else heads)
        return found


class Qwen3Family(QwenFamily):
    """Qwen's families since Qwen3-VL: every block of the tower sees the whole image."""

    processor_class = "Qwen3VLProcessor"
    least_tokens = 64

    @property
    def attending(self) -> Mapping[str, int]:
        """The last block, and those at the relative depths at which CLIP's layers are read."""
        every = range(len(self.model.model.visual.blocks))
        return {"full": every[-1], "middle": at_depth(every, MIDDLE), "shallow": at_depth(every, SHALLOW)}

    @property
    def merging(self) -> nn.Module:
        """The merger's first linear."""
        return self.model.model.visual.merger.linear_fc1

    def project(self, patches: Tensor) -> Tensor:
        """Apply the merger's MLP to normalised patches side by side [B, M, C]: [B, M, D]."""
        merger = self.model.model.visual.merger
        return merger.linear_fc2(merger.act_fn(merger.linear_fc1(patches)))


def unpatched(patches: Tensor, grid: tuple[int, int], channels: int, merge: int, patch: int) -> Tensor:
    """The image [frames * channels, H, W] that was cut into patches [P, channels * frames * patch * patch].

    Args:
        patches: in the order of the tower, squares of merge * merge patches side by side.
        grid: height and width in patches.
        channels: number of colours.
        merge: side of the squares that become one token.
        patch: side of a patch in pixels.
    """
    height, width = grid
    blocks = patches.view(height // merge, width // merge, merge, merge, channels, -1, patch, patch)
    return blocks.permute(5, 4, 0, 2, 6, 1, 3, 7).reshape(-1, height * patch, width * patch)


def patched(image: Tensor, channels: int, merge: int, patch: int) -> Tensor:
    """Cut an image [frames * channels, H, W] into patches; see `unpatched`."""
    height, width = (side // patch for side in image.shape[1:])
    blocks = image.view(-1, channels, height // merge, merge, patch, width // merge, merge, patch)
    return blocks.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(height * width, -1)


def _rotated(values: Tensor, rotation: tuple[Tensor, Tensor], attention: Any) -> Tensor:
    """Apply the rotary embedding of a vision block to queries or keys: [P, C] -> [P, C] in float32.

    Args:
        values: [P, heads * width] queries or keys of P patches.
        rotation: cosine and sine that the block was called with.
        attention: an attention module of the tower, for its number of heads.
    """
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    wide = values.float().unflatten(-1, (attention.num_heads, -1))
    return apply_rotary_pos_emb_vision(wide, wide, *rotation)[0].flatten(1)


def _received(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """Attention that each patch of one image receives, averaged over heads and queries: [P].

    Computed for a few queries at a time.
    """
    total = keys.new_zeros(len(keys))
    for part in queries.split(QUERIES):
        total += received(part[None], keys[None], heads)[0] * len(part)
    return total / len(queries)
