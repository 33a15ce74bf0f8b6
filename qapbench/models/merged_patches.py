"""Families of which a visual token is made of several patches of a tower that takes images or tiles of one size."""

from __future__ import annotations

import abc
import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qapbench.errors import UserError
from qapbench.methods.tokens import VisionTokens

from .encoded import EncodedImage, EncodedImages, Views
from .family import Family
from .outline import ImageOutline, Size, blank_tokens
from .tower import MIDDLE, OF_CLS, RECEIVED, SHALLOW, at_depth, digest, received, recorded

ATTENTION: Mapping[str, str] = {
    "cls_attention": "",
    "last_cls_attention": "",
    "attention_received": "",
    "middle_attention_received": "middle_",
    "shallow_cls_attention": "shallow_",
}
"""Fields of attention -> prefix of the queries and keys that they are made from."""


class PatchesFamily(Family):
    """Families with several patches in a token, whose tower has no CLS token.

    Attention received from all patches takes the place of CLS attention. Attention and keys of a token are the means
    over its patches.
    """

    @property
    def available_fields(self) -> frozenset[str]:
        """All fields of the vision tower except `cls_token`, and the image at a lower size."""
        return frozenset({"patches", "image_ids", "grid", "keys", "last_keys", "downsampled", *ATTENTION})

    @property
    def substitutes(self) -> Mapping[str, str]:
        """Attention received from all patches takes the place of CLS attention."""
        return dict.fromkeys(OF_CLS, RECEIVED)


class MergedFamily(PatchesFamily):
    """Families with a SigLIP tower, whose last layer is read, and several of its patches in a token."""

    @property
    @abc.abstractmethod
    def layers(self) -> Sequence[Any]:
        """The layers of the vision tower."""

    @property
    @abc.abstractmethod
    def merging(self) -> nn.Module:
        """The module whose input `patches` holds, one row per token."""

    @abc.abstractmethod
    def merged(self, values: Tensor) -> Tensor:
        """The mean over the patches of each token: [T, P, C] -> [T, N, C]."""

    def views_of(self, size: Size) -> int:
        """Number of views that the processor makes of an image, unless its config says otherwise.

        Args:
            size: height and width of the image in pixels.
        """
        return 1

    def outline(self, sizes: Sequence[Size]) -> ImageOutline:
        """Views of one size; see `Family.outline`."""
        vision = self.model.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        counts = [self.views_of(size) for size in sizes]
        return tiled_outline(counts, int(self.view_tokens or 0), patches, (patches,) * len(self.layers))

    @contextlib.contextmanager
    def recording(self, needs: frozenset[str], calls: Mapping[nn.Module, str]) -> Iterator[dict[str, Any]]:
        """Capture the tensors that the fields in `needs` are made from, while the context is open.

        Args:
            needs: fields of `VisionTokens`.
            calls: modules whose keyword arguments to capture as well -> name.

        Yields:
            A dict that fills when the tower runs: `patches`, queries `q` and keys `k` of the last layer, both with the
            prefixes `middle_` and `shallow_` of those layers, and what `calls` names.
        """
        self.check_available(needs)
        used = {
            "": self.layers[-1],
            "middle_": at_depth(self.layers, MIDDLE),
            "shallow_": at_depth(self.layers, SHALLOW),
        }
        read = {ATTENTION[name] for name in ATTENTION.keys() & needs} | (
            {""} if needs & {"keys", "last_keys"} else set()
        )
        outputs = [
            (getattr(layer.self_attn, f"{kind}_proj"), f"{prefix}{kind}")
            for prefix, layer in used.items()
            for kind in "qk"
            if prefix in read
        ]
        with recorded(outputs, {self.merging: "patches"}, calls) as captured:
            yield captured

    def fields(self, seen: Mapping[str, Tensor], needs: frozenset[str], pixels: Tensor) -> dict[str, Any]:
        """Make the fields of `VisionTokens` other than `projected` for T images or tiles.

        Args:
            seen: what `recording` captured.
            needs: the fields to make.
            pixels: [T, 3, H, W] input of the tower, which the content hashes are computed from.
        """
        heads, side = self.model.config.vision_config.num_attention_heads, math.isqrt(seen["patches"].shape[1])
        found: dict[str, Any] = {"heads": heads, "grid": (side, side)}
        for name in ATTENTION.keys() & needs:
            query, key = (seen[f"{ATTENTION[name]}{kind}"] for kind in "qk")
            parts = 1 if name == "last_cls_attention" else heads
            found[name] = self.merged(received(query, key, parts)[..., None])[..., 0]
        if "patches" in needs:
            found["patches"] = seen["patches"]
        for name in needs & {"keys", "last_keys"}:
            found[name] = self.merged(seen["k"])
        if "image_ids" in needs:
            found["image_ids"] = tuple(digest(tile) for tile in pixels)
        return found


class Joined(list[Tensor]):
    """The features [K, D] of each image, for models that expect one tensor of all images.

    `generate` repeats features image by image, and the model then asks for the tensor by `to`.
    """

    def to(self, *args: Any) -> Tensor:
        """All of them in one tensor [M, D]; see `Tensor.to`."""
        return torch.cat(list(self)).to(*args)


@functools.cache
def _joined_output() -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    class JoinedOutput(BaseModelOutputWithPooling):
        """An encoder's output whose features stay `Joined` when `generate` repeats them for its beams."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, Joined(value) if isinstance(value, list) else value)

    return JoinedOutput


def joined(features: list[Tensor]) -> dict[str, Any]:
    """Keyword arguments that hand the features [K, D] of each image to a model that expects one tensor."""
    return {"mm_encoder_outputs": {"image": _joined_output()(pooler_output=features)}}


def runs(ids: Tensor, token: int) -> list[tuple[int, int, int]]:
    """Unbroken runs of a token in a prompt, as (row, first column, column behind the last one).

    Args:
        ids: [B, L] token ids.
        token: the token.
    """
    found = []
    for row, marks in enumerate((ids == token).tolist()):
        start = 0
        for marked, run in itertools.groupby(marks):
            end = start + len(list(run))
            if marked:
                found.append((row, start, end))
            start = end
    return found


def check_runs(lengths: Sequence[int], tokens: VisionTokens) -> None:
    """Check that the runs of placeholders in a prompt consist of whole tiles, and hold all of them.

    Args:
        lengths: number of placeholders of each run.
        tokens: the tiles.

    Raises:
        UserError: they do not.
    """
    if any(length % tokens.count for length in lengths) or sum(lengths) != tokens.batch * tokens.count:
        raise UserError(
            f"input_ids hold runs of {list(lengths)} image placeholders, but {tokens.batch} tile(s) of {tokens.count} "
            "tokens were given"
        )


def tiled(tokens: VisionTokens, counts: Sequence[int]) -> EncodedImages:
    """Images of which every tile is a view.

    Args:
        tokens: the tiles of all images in the order of their placeholders.
        counts: number of tiles of each image.
    """
    owners = [image for image, count in enumerate(counts) for _ in range(count)]
    within = [tile for count in counts for tile in range(count)]
    places = torch.arange(tokens.count) + torch.tensor(within).unsqueeze(1) * tokens.count
    images = [EncodedImage(part.flatten(0, 1)) for part in tokens.projected.split(list(counts))]
    return EncodedImages(images, [Views(tokens, owners, places.to(tokens.projected.device))])


def tiled_outline(counts: Sequence[int], size: int, patches: int, lengths: Sequence[int]) -> ImageOutline:
    """The outline of images of which every tile is a view.

    Args:
        counts: number of tiles of each image.
        size: number of tokens of a tile.
        patches: number of patches of a tile.
        lengths: for each layer of the tower, the length of the sequence that a tile is.
    """
    side, total = math.isqrt(size), sum(counts)
    tokens = blank_tokens(total, size, (side, side))
    attended = tuple((length,) * total for length in lengths)
    return ImageOutline(tiled(tokens, counts), attended, total * patches, total * size)
