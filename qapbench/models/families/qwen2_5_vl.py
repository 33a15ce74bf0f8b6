"""Qwen2.5-VL: images at their own resolution, window attention, a merger of 2 x 2 patches, M-RoPE positions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qapbench.errors import UserError
from qapbench.methods.tokens import VisionTokens
from qapbench.models.encoded import EncodedImage, EncodedImages, Views
from qapbench.models.family import TINY_TEXT, Family, family
from qapbench.models.outline import ImageOutline, Size, blank_tokens, each_alone
from qapbench.models.tower import MIDDLE, OF_CLS, RECEIVED, digest, received, recorded

TOKENS = (4, 16384)  # least and most tokens of an image, unless the processor's config says otherwise
QUERIES = 512  # rows of an attention map held in memory at once: an image has up to 16,384 patches
# Fields that need a block with full attention.
ELSEWHERE = frozenset({"middle_attention_received", "shallow_cls_attention"})
ATTENTION = frozenset({"attention_received", "cls_attention", "last_cls_attention"}) | ELSEWHERE


@family("qwen2_5_vl")
class Qwen25VL(Family):
    """One view per image. A token is what the merger makes of 2 x 2 patches.

    `patches` holds the merger's normalised input, four patches side by side, so `project` is the rest of the merger. A
    token's attention and keys are the means over its patches. Attention is that of the last block with full attention,
    for `middle_attention_received` that of the block with full attention nearest to the middle, and for
    `shallow_cls_attention` that of the first block with full attention. Attention received
    also takes the place of CLS attention, because the tower has no CLS token. Kept tokens and text keep their M-RoPE
    positions, whether `prune.positions` in the spec is "compact" or "keep".
    """

    image_inputs = ("pixel_values", "image_grid_thw")
    processor_class = "Qwen2_5_VLProcessor"

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """The language model, the merger (as projector) and the blocks of the vision tower."""
        core = self.model.model
        return {"language": core.language_model, "projector": core.visual.merger, "vision": core.visual.blocks}

    @property
    def available_fields(self) -> frozenset[str]:
        """All fields but `cls_token`. Those of attention need a block with full attention."""
        fields = frozenset({"patches", "image_ids", "grid", "keys", "last_keys"})
        return fields | ATTENTION if self._full else fields

    @property
    def substitutes(self) -> Mapping[str, str]:
        """Attention received from all patches takes the place of CLS attention."""
        return dict.fromkeys(OF_CLS, RECEIVED)

    @property
    def _full(self) -> list[int]:
        """Indices of the blocks in which every patch of an image attends to every other.

        In the other blocks attention stays within a window.
        """
        visual = self.model.model.visual
        return sorted(set(visual.fullatt_block_indexes) & set(range(len(visual.blocks))))

    @property
    def _merge(self) -> int:
        """Side of the square of patches that the merger joins into one token."""
        return self.model.model.visual.spatial_merge_size

    @property
    def tower(self) -> nn.Module:
        """The whole tower, merger included."""
        return self.model.model.visual

    def outline(self, sizes: Sequence[Size]) -> ImageOutline:
        """Images at their own resolution, rounded to whole tokens; see `Family.outline`."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
        from transformers.vision_utils import get_vision_window_index

        visual, merge = self.model.model.visual, self._merge
        side = visual.patch_size * merge
        least, most = (side**2 * limit for limit in TOKENS)
        resized = [smart_resize(height, width, side, least, most) for height, width in sizes]
        grids = torch.tensor(
            [[1, height // visual.patch_size, width // visual.patch_size] for height, width in resized]
        )
        bounds = get_vision_window_index(grids, merge, visual.window_size, visual.patch_size)[1]
        windows = tuple(int(size) for size in bounds.diff() if size)
        whole = tuple(int(size) for size in grids.prod(dim=-1))
        attended = tuple(whole if index in self._full else windows for index in range(len(visual.blocks)))
        tokens = [
            blank_tokens(1, height * width // merge**2, (height // merge, width // merge))
            for _, height, width in grids.tolist()
        ]
        images = [EncodedImage(one.projected[0]) for one in tokens]
        encoded = EncodedImages(images, each_alone(tokens))
        return ImageOutline(encoded, attended, sum(whole), sum(whole) // merge**2)

    def project(self, patches: Tensor) -> Tensor:
        """Apply the merger's MLP to normalised patches side by side [B, M, C]: [B, M, D]."""
        return self.model.model.visual.merger.mlp(patches)

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

    @torch.no_grad()
    def encode_images(self, inputs: Mapping[str, Any], needs: frozenset[str]) -> EncodedImages:
        """Run vision tower and merger on all images of the call at once; see `Family.encode_images`."""
        pixels, grids = inputs["pixel_values"], inputs.get("image_grid_thw")
        if grids is None:
            raise UserError("image_grid_thw: needed beside pixel_values; the processor gives both")
        with self._recording(needs) as captured:
            features = self.model.model.get_image_features(pixels, grids, return_dict=True).pooler_output
        fields = self._fields(captured, needs, grids)
        heads = self.model.config.vision_config.num_heads
        views, start, unit = [], 0, self._merge**2
        for index, (feature, (frames, height, width)) in enumerate(zip(features, grids.tolist(), strict=True)):
            stop = start + len(feature)
            own: dict[str, Any] = {name: value[None, start:stop] for name, value in fields.items()}
            if "image_ids" in needs:
                own["image_ids"] = (digest(pixels[start * unit : stop * unit]),)
            grid = (frames * height // self._merge, width // self._merge)
            tokens = VisionTokens(projected=feature[None], grid=grid, heads=heads, **own)
            views.append(Views(tokens, [index], torch.arange(len(feature), device=feature.device)[None]))
            start = stop
        return EncodedImages([EncodedImage(feature) for feature in features], Views.grouped(views))

    @contextlib.contextmanager
    def _recording(self, needs: frozenset[str]) -> Iterator[dict[str, Any]]:
        """Capture the tensors that the fields in `needs` are made from, while the context is open.

        These are the queries, keys and values of the blocks concerned (`last`, `full`, `middle`, `shallow`), the rotary
        embedding that is applied to them (in `call`), and the normalised input of the merger (`patches`).
        """
        self.check_available(needs)
        visual = self.model.model.visual
        last, blocks = len(visual.blocks) - 1, {}
        if needs & {"keys", "last_keys"}:
            blocks["last"] = last
        if needs & ATTENTION - ELSEWHERE:
            blocks["full"] = self._full[-1]
        if "middle_attention_received" in needs:
            middle = max(round(len(visual.blocks) * MIDDLE), 1) - 1
            blocks["middle"] = min(self._full, key=lambda index: (abs(index - middle), index))
        if "shallow_cls_attention" in needs:
            blocks["shallow"] = self._full[0]
        outputs = [(visual.blocks[at].attn.qkv, name) for name, at in blocks.items()]
        inputs = {visual.merger.mlp: "patches"} if "patches" in needs else {}
        with recorded(outputs, inputs, {visual.blocks[last].attn: "call"}) as captured:
            yield captured

    def _fields(self, seen: Mapping[str, Any], needs: frozenset[str], grids: Tensor) -> dict[str, Tensor]:
        """Make fields [M, ...] of the M tokens of all images, in raster order."""
        from transformers.vision_utils import get_vision_window_index

        visual, heads = self.model.model.visual, self.model.config.vision_config.num_heads
        window, _ = get_vision_window_index(grids, self._merge, visual.window_size, visual.patch_size)
        raster = window.argsort()  # the tower orders patches by window
        sizes = grids.prod(dim=-1).tolist()

        def merged(values: Tensor) -> Tensor:
            return values.unflatten(0, (-1, self._merge**2)).mean(dim=1)[raster]

        def attention(name: str, heads: int) -> Tensor:
            query, key, _ = seen[name].unflatten(-1, (3, -1)).unbind(dim=1)
            query, key = (_rotated(x, seen["call"]["position_embeddings"], visual.blocks[0].attn) for x in (query, key))
            images = zip(query.split(sizes), key.split(sizes), strict=True)
            return merged(torch.cat([_received(q, k, heads) for q, k in images]))

        found = {}
        if "patches" in needs:
            found["patches"] = seen["patches"][raster]
        for name in needs & {"keys", "last_keys"}:
            found[name] = merged(seen["last"].unflatten(-1, (3, -1))[:, 1])
        for name in needs & {"attention_received", "cls_attention"}:
            found[name] = attention("full", heads)
        if "last_cls_attention" in needs:
            found["last_cls_attention"] = attention("full", 1)
        if "middle_attention_received" in needs:
            found["middle_attention_received"] = attention("middle", heads)
        if "shallow_cls_attention" in needs:
            found["shallow_cls_attention"] = attention("shallow", heads)
        return found

    @classmethod
    def tiny(cls) -> tuple[Any, dict[str, Any]]:
        """A random vision tower and Qwen2.5, and one prompt with an image of 8 x 10 patches."""
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        vision = {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 48,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1, 3],
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
        }
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
        text = {**TINY_TEXT, "rope_parameters": rope}
        config = Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=3,
            video_token_id=4,
            vision_start_token_id=5,
            vision_end_token_id=6,
        )
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
        ids = torch.tensor([[1, 9, 5, *[3] * 20, 6, 8, 7]])  # 8 x 10 patches, which are 4 x 5 tokens
        return model, {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == 3).long(),
            "pixel_values": torch.rand(80, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 8, 10]]),
        }


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
