"""MiniCPM-V 4.6: an image scaled down and its slices, each of its own shape, merged twice, and Qwen3.5's decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qapbench.errors import UserError
from qapbench.methods.tokens import VisionTokens
from qapbench.models.encoded import EncodedImage, EncodedImages, Views
from qapbench.models.family import TINY_TEXT, TINY_TOWER, family, images_only
from qapbench.models.merged_patches import ATTENTION, PatchesFamily, runs
from qapbench.models.outline import ImageOutline, Size, blank_tokens
from qapbench.models.tower import (
    MIDDLE,
    SHALLOW,
    at_depth,
    digest,
    received,
    recorded,
    scaled,
    smaller_grid,
)

from .qwen3_5 import TINY_HYBRID

Grid = tuple[int, int]


@family("minicpmv4_6")
class MiniCPMV46(PatchesFamily):
    """The image scaled down is a view, and so is each of its slices, which follow it. Grids may differ.

    Within the tower a merger makes one of 2 x 2 patches, behind the tower another one of 2 x 2 of these, side by side,
    which is what `patches` holds. The patches of a token are those in the layer that is read.

    Raises:
        UserError: there is more than one merger behind the tower.
    """

    image_inputs = ("pixel_values", "target_sizes")
    longest: ClassVar[int] = 448
    """Side of a square of as many pixels as a slice has, unless the processor's config says otherwise."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if model.config.merger_times != 1:
            raise UserError(f"model: merger_times is {model.config.merger_times}; only 1 is supported")

    @property
    def parts(self) -> Mapping[str, nn.Module]:
        """The language model, the merger behind the tower (as projector) and the tower with the merger inside it."""
        core = self.model.model
        return {"language": core.language_model, "projector": core.merger, "vision": core.vision_tower}

    @property
    def inner(self) -> int:
        """Index of the layer behind which the tower merges 2 x 2 patches; -1 if it does not."""
        config = self.model.config
        return -1 if config.downsample_mode == "4x" else config.vision_config.insert_layer_id

    @property
    def side(self) -> int:
        """Side of the square of patches that a token is made of."""
        return 2 if self.inner < 0 else 4

    def blocks(self, part: str) -> list[nn.Module]:
        """The layers of a part; those of the tower with the merger among them."""
        if part != "vision":
            return super().blocks(part)
        tower, inner = self.model.model.vision_tower, self.inner
        layers = list(tower.encoder.layers)
        return layers if inner < 0 else [*layers[: inner + 1], tower.vit_merger, *layers[inner + 1 :]]

    def attention_layer(self, field: str) -> int | None:
        """The last layer or those of CLIP's relative depths, counted with the merger among them."""
        every = range(len(self.model.model.vision_tower.encoder.layers))
        depths = {"middle_": at_depth(every, MIDDLE), "shallow_": at_depth(every, SHALLOW)}
        at = depths.get(ATTENTION[field], every[-1])
        return at + (0 <= self.inner < at)

    def rows_per_token(self, name: str) -> float:
        """The MLP of the merger inside the tower gets a row for four patches."""
        return 0.25 if ".vit_merger.linear_" in name else 1.0

    def project(self, patches: Tensor) -> Tensor:
        """Apply the merger's MLP to patches side by side [B, M, C]: [B, M, D]."""
        return self.model.model.merger.mlp[0](patches).unflatten(0, patches.shape[:-1])

    @torch.no_grad()
    def encode_images(self, inputs: Mapping[str, Any], needs: frozenset[str]) -> EncodedImages:
        """Run vision tower and merger on all slices of the call at once; see `Family.encode_images`."""
        self.check_available(needs)
        if inputs.get("target_sizes") is None:
            raise UserError("target_sizes: needed beside pixel_values; the processor gives both")
        if inputs.get("downsample_mode") not in (None, self.model.config.downsample_mode):
            raise UserError("downsample_mode: set it in the model's config, where the framework reads it too")
        pixels, sizes = inputs["pixel_values"][:1], inputs["target_sizes"]
        layers = self.model.model.vision_tower.encoder.layers
        used = {"": layers[-1], "middle_": at_depth(layers, MIDDLE), "shallow_": at_depth(layers, SHALLOW)}
        outputs = [
            (getattr(layer.self_attn, f"{kind}_proj"), f"{prefix}{kind}")
            for prefix, layer in used.items()
            for kind in "qk"
        ]
        with recorded(outputs, {}) as seen:
            made = self.model.model.get_image_features(pixels, sizes, return_dict=True)
        grids = [(height // self.side, width // self.side) for height, width in sizes.tolist()]
        split = pixels.split([int(height * width) * pixels.shape[2] for height, width in sizes.tolist()], dim=-1)
        heads = self.model.config.vision_config.num_attention_heads
        fields = self._fields({**seen, "patches": made.last_hidden_state}, needs, grids)
        if "image_ids" in needs:
            fields["image_ids"] = [(digest(image),) for image in split]
        slices = [
            VisionTokens(projected=projected[None], grid=grid, heads=heads, **{k: v[at] for k, v in fields.items()})
            for at, (projected, grid) in enumerate(zip(made.pooler_output, grids, strict=True))
        ]
        return _joined(slices, self._owners(inputs["input_ids"], slices))

    def _fields(self, seen: Mapping[str, Tensor], needs: frozenset[str], grids: list[Grid]) -> dict[str, list[Any]]:
        """Fields [1, N, ...] of each slice, from the states of all of them side by side.

        Args:
            seen: captured states [1, P, C], by name.
            needs: the fields to make.
            grids: height and width of each slice in tokens.
        """
        tokens = sum(height * width for height, width in grids)
        heads = self.model.config.vision_config.num_attention_heads

        def split(values: Tensor) -> list[Tensor]:
            per_token = values.shape[1] // tokens
            return list(values[0].split([height * width * per_token for height, width in grids]))

        def squares(values: Tensor, grid: Grid) -> Tensor:
            """The patches [N, S, C] of each token, row by row, of a slice's patches [N * S, C]."""
            side = round((len(values) / (grid[0] * grid[1])) ** 0.5)
            blocks = values.view(grid[0], side, grid[1], side, -1)
            return blocks.permute(0, 2, 1, 3, 4).reshape(grid[0] * grid[1], side * side, -1)

        def mean(values: Tensor, grid: Grid) -> Tensor:
            return squares(values, grid).mean(dim=1)[None]

        found: dict[str, list[Any]] = {}
        if "patches" in needs:
            one_row = zip(split(seen["patches"]), grids, strict=True)
            found["patches"] = [squares(values, grid).flatten(1)[None] for values, grid in one_row]
        for name in needs & {"keys", "last_keys"}:
            found[name] = [mean(keys, grid) for keys, grid in zip(split(seen["k"]), grids, strict=True)]
        for name in ATTENTION.keys() & needs:
            prefix, parts = ATTENTION[name], 1 if name == "last_cls_attention" else heads
            both = zip(split(seen[f"{prefix}q"]), split(seen[f"{prefix}k"]), grids, strict=True)
            found[name] = [mean(received(q[None], k[None], parts)[0, :, None], grid)[..., 0] for q, k, grid in both]
        return found

    def _owners(self, ids: Tensor, slices: Sequence[VisionTokens]) -> list[int]:
        """The index of each slice's image.

        In a prompt an image scaled down stands behind one mark, and a slice behind another.

        Args:
            ids: [B, L] token ids.
            slices: the slices, in the order of their placeholders.

        Raises:
            UserError: the prompt holds other runs of placeholders.
        """
        spans = runs(ids, self.image_token)
        lengths, counts = [end - start for _, start, end in spans], [one.count for one in slices]
        if lengths != counts:
            raise UserError(f"input_ids hold runs of {lengths} image placeholders, but slices of {counts} were given")
        owners: list[int] = []
        for row, start, _ in spans:
            first = next(at for other, at, _ in spans if other == row)
            begins = int(ids[row, start - 1]) == int(ids[row, first - 1])
            owners.append((owners[-1] if owners else -1) + begins)
        return owners

    def outline(self, sizes: Sequence[Size]) -> ImageOutline:
        """The image scaled down and up to nine slices; see `Family.outline`."""
        from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

        images, patch = MiniCPMV4_6ImageProcessorPil(), self.model.config.vision_config.patch_size
        options = (self.longest, patch, self.model.config.downsample_mode)
        grids: list[Grid] = []
        owners: list[int] = []
        for owner, size in enumerate(sizes):
            cut = images.get_sliced_grid(size, images.max_slice_nums, self.longest)
            shapes = [images.find_best_resize(size, *options, allow_upscale=cut is None)]
            if cut is not None:
                height, width = images.get_refine_size(size, cut, *options, allow_upscale=True)
                shapes += [(height // cut[0], width // cut[1])] * (cut[0] * cut[1])
            grids += [(height // patch, width // patch) for height, width in shapes]
            owners += [owner] * len(shapes)
        patches = [height * width for height, width in grids]
        tokens = [blank_tokens(1, h * w // self.side**2, (h // self.side, w // self.side)) for h, w in grids]
        inner = self.inner if self.inner >= 0 else len(self.blocks("vision"))
        windows = (4,) * (sum(patches) // 4)
        attended = [tuple(patches), windows, tuple(count // 4 for count in patches)]
        layers = tuple(attended[(at > inner) + (at > inner + 1)] for at in range(len(self.blocks("vision"))))
        return ImageOutline(_joined(tokens, owners), layers, sum(patches), sum(patches) // self.side**2)

    @torch.no_grad()
    def downsampled(self, inputs: Mapping[str, Any], count: int, views: Views) -> Tensor:
        """The slices at a lower size; see `Family.downsampled`. The tower finds the place of a patch by where it is."""
        pixels, sizes = inputs["pixel_values"][:1], inputs["target_sizes"]
        grid, patch = views.tokens.grid or (1, views.tokens.count), pixels.shape[2]
        split = pixels.split([int(height * width) * patch for height, width in sizes.tolist()], dim=-1)
        own = [
            image.unflatten(-1, (height, width, patch)).permute(0, 1, 3, 2, 4, 5).flatten(4, 5).flatten(2, 3)
            for image, (height, width) in zip(split, sizes.tolist(), strict=True)
            if (height // self.side, width // self.side) == grid
        ]
        rows, columns = smaller_grid(grid, count)
        unit = self.side * patch
        small = scaled(torch.cat(own), (rows * unit, columns * unit))
        cut = small.unflatten(2, (-1, patch)).transpose(2, 3).flatten(3)  # [S, 3, patch, height * width]
        packed = torch.cat(list(cut), dim=-1)[None]
        each = sizes.new_tensor([[rows * self.side, columns * self.side]]).expand(len(own), -1)
        made = self.model.model.get_image_features(packed, each, return_dict=True).pooler_output
        return torch.stack(list(made)).mT.unflatten(-1, (rows, columns))

    @classmethod
    def load_processor(cls, folder: Path, trust_remote_code: bool = False) -> Any:
        """Load the processor of a checkpoint folder, for images and text only."""
        return processor_class().from_pretrained(folder)

    @classmethod
    def tiny(cls) -> tuple[Any, dict[str, Any]]:
        """A random vision tower and hybrid decoder, and one prompt with an image scaled down and two slices of it."""
        from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1], "partial_rotary_factor": 0.5}
        config = MiniCPMV4_6Config(
            vision_config={**TINY_TOWER, "patch_size": 2},
            text_config={**TINY_TEXT, **TINY_HYBRID, "model_type": "qwen3_5_text", "rope_parameters": rope},
            insert_layer_id=1,
            image_token_id=3,
            video_token_id=4,
        )
        model = MiniCPMV4_6ForConditionalGeneration(config).eval()
        ids = torch.tensor([[1, 9, 5, *[3] * 18, 6, 7, *[3] * 16, 8, 7, *[3] * 16, 8, 10, 11]])
        return model, {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.rand(1, 3, 2, 2 * (12 * 24 + 2 * 16 * 16)),
            "target_sizes": torch.tensor([[12, 24], [16, 16], [16, 16]], dtype=torch.int32),
        }


def processor_class() -> Any:
    """The processor of transformers without its video processor, which needs torchvision."""
    from transformers import MiniCPMV4_6Processor, ProcessorMixin

    class Parts(ProcessorMixin):
        """Takes the parts of a processor, and drops the video processor."""

        def __init__(self, images: Any, videos: Any, tokenizer: Any, **options: Any) -> None:
            super().__init__(images, tokenizer, **options)

    base = images_only("MiniCPMV4_6Processor")
    unread = SimpleNamespace(slice_mode=False, downsample_mode="16x")

    # transformers reads the names of the arguments to know what of a processor's files it may hand on.
    def __init__(self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        MiniCPMV4_6Processor.__init__(self, image_processor, None, tokenizer, chat_template)

    return type("MiniCPMV4_6Processor", (base, Parts), {"__init__": __init__, "video_processor": unread})


def _joined(slices: Sequence[VisionTokens], owners: list[int]) -> EncodedImages:
    """The images of a call from their slices.

    Args:
        slices: each as a batch of one, in the order of their placeholders.
        owners: for each slice, the index of its image.
    """
    images, views = [], []
    for owner in range(owners[-1] + 1 if owners else 0):
        own, start = [one for one, of in zip(slices, owners, strict=True) if of == owner], 0
        images.append(EncodedImage(torch.cat([one.projected[0] for one in own])))
        for one in own:
            places = torch.arange(start, start + one.count, device=one.projected.device)
            views.append(Views(one, [owner], places[None]))
            start += one.count
    return EncodedImages(images, Views.grouped(views))
