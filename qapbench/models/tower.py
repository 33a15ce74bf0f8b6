"""Families built like LLaVA: a CLIP or SigLIP tower, the patches of one of its layers, a projector, a decoder."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate

from qapbench.errors import UserError

from .encoded import EncodedImages
from .family import Family
from .outline import ImageOutline
from .row_products import computing

MIDDLE = 9 / 24  # relative depth of the layer in which HiPrune finds objects: the ninth of 24
SHALLOW = 6 / 24  # relative depth of the layer in which VScan finds details: the sixth of 24
CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
EMPTY: Mapping[nn.Module, str] = {}
OF_CLS = ("cls_attention", "last_cls_attention", "shallow_cls_attention")  # fields that need a CLS token
RECEIVED = "the tower has no CLS token; attention received from all patches stands in"


class TowerFamily(Family):
    """What the relatives of LLaVA have in common.

    Their vision towers take a batch with one image or tile per row. `recording` captures tensors while the tower runs,
    and `fields` makes fields of `VisionTokens` from them.

    Raises:
        UserError: the tower is neither CLIP nor SigLIP, or the model's select strategy does not fit it. CLIP's CLS
            token must be dropped, and all tokens of SigLIP must be kept.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        kind, strategy = self.vision.model_type, model.config.vision_feature_select_strategy
        if kind not in (CLIP, SIGLIP):
            raise UserError(f"model: vision tower '{kind}' is not supported; known are {CLIP} and {SIGLIP}")
        wanted = "default" if kind == CLIP else "full"
        if strategy != wanted:
            raise UserError(
                f"model: vision_feature_select_strategy is '{strategy}'; for {kind} only '{wanted}' is supported"
            )

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
    def vision(self) -> Any:
        """Config of the vision tower."""
        return self.model.config.vision_config

    @property
    def skip(self) -> int:
        """Number of tokens that the tower puts in front of the patches: 1 for CLIP (its CLS token), 0 for SigLIP."""
        return int(self.vision.model_type == CLIP)

    @property
    def available_fields(self) -> frozenset[str]:
        """All fields of the vision tower; `cls_token` only for CLIP."""
        fields = {"patches", "image_ids", "grid", "cls_attention", "keys", "last_cls_attention", "last_keys"}
        fields |= {"attention_received", "middle_attention_received", "shallow_cls_attention"}
        return frozenset(fields | {"cls_token"} if self.skip else fields)

    @property
    def substitutes(self) -> Mapping[str, str]:
        """None for CLIP.

        SigLIP has no CLS token, so attention received from all patches takes the place of CLS attention.
        """
        return {} if self.skip else dict.fromkeys(OF_CLS, RECEIVED)

    @property
    def clip_width(self) -> int | None:
        """Hidden size of the tower if it is CLIP; None for SigLIP."""
        return self.vision.hidden_size if self.skip else None

    @property
    def view_tokens(self) -> int | None:
        """Number of patches of an image or tile."""
        return (self.vision.image_size // self.vision.patch_size) ** 2

    def project(self, patches: Tensor) -> Tensor:
        """Apply the projector to patches [B, M, C]: [B, M, D]."""
        return self.model.model.multi_modal_projector(patches)

    def fields(self, seen: Mapping[str, Tensor], needs: frozenset[str], pixels: Tensor) -> dict[str, Any]:
        """Make fields of `VisionTokens` for T images or tiles.

        Args:
            seen: tensors that `recording` captured, by their names.
            needs: fields to make in addition to `projected`.
            pixels: [T, 3, H, W] input of the tower, which the content hashes are computed from.

        Returns:
            Keyword arguments of `VisionTokens`. `grid` is among them if the number of tokens is a square.
        """
        heads, skip = self.vision.num_attention_heads, self.skip
        seen = {name: value.to(seen["projected"].device) for name, value in seen.items()}
        found: dict[str, Any] = {"projected": seen["projected"], "heads": heads}
        side = math.isqrt(found["projected"].shape[1])
        if side * side == found["projected"].shape[1]:
            found["grid"] = (side, side)
        if "patches" in needs:
            found["patches"] = seen["patches"]
        if "cls_token" in needs:
            found["cls_token"] = seen["hidden"][:, 0]
        if "keys" in needs:
            found["keys"] = seen["keys"][:, skip:]
        if "last_keys" in needs:
            found["last_keys"] = seen["last_keys"][:, skip:]
        row = cls_row if skip else received
        if "cls_attention" in needs:
            found["cls_attention"] = row(seen["queries"], seen["keys"], heads)[:, skip:]
        if "last_cls_attention" in needs:
            found["last_cls_attention"] = row(seen["last_queries"], seen["last_keys"], 1)[:, skip:]
        if "shallow_cls_attention" in needs:
            found["shallow_cls_attention"] = row(seen["shallow_queries"], seen["shallow_keys"], heads)[:, skip:]
        if "attention_received" in needs:
            found["attention_received"] = received(seen["queries"], seen["keys"], heads)[:, skip:]
        if "middle_attention_received" in needs:
            middle = received(seen["middle_queries"], seen["middle_keys"], heads)
            found["middle_attention_received"] = middle[:, skip:]
        if "image_ids" in needs:
            found["image_ids"] = tuple(digest(tile) for tile in pixels)
        return found

    @contextlib.contextmanager
    def recording(self, needs: frozenset[str]) -> Iterator[dict[str, Tensor]]:
        """Capture the tensors that the fields in `needs` are made from, while the context is open.

        Hooks take them from the projector and from the query and key projections of the layers concerned, so the
        tower's own attention can stay SDPA or flash attention.

        Yields:
            A dict that fills when the tower runs: `projected`, `patches`, `hidden`, `queries`, `keys`, and the latter
            two with the prefixes `last_`, `middle_` and `shallow_`.
        """
        self.check_available(needs)
        projector, layers = self.model.model.multi_modal_projector, self.model.model.vision_tower.encoder.layers
        wanted: list[tuple[nn.Module, str]] = [(projector, "projected")]
        layer = layers[self._feature_layers(len(layers))[-1]]
        if "cls_token" in needs:
            wanted.append((layer, "hidden"))
        for prefix, at in self._recorded_layers(needs, len(layers)).items():
            attention = layers[at].self_attn
            wanted += [(attention.q_proj, f"{prefix}queries"), (attention.k_proj, f"{prefix}keys")]
        with (
            unread(layers[self.tower_layers(needs) :]),
            recorded(wanted, {projector: "patches"} if "patches" in needs else {}) as captured,
        ):
            yield captured

    def tower_layers(self, needs: frozenset[str]) -> int:
        """Number of layers that run: up to the last one that the projector or a field in `needs` reads."""
        count = len(self.model.model.vision_tower.encoder.layers)
        return max(*self._feature_layers(count), *self._recorded_layers(needs, count).values(), 0) + 1

    def _recorded_layers(self, needs: frozenset[str], count: int) -> dict[str, int]:
        """Indices of the layers whose queries and keys fields in `needs` are made from, by the prefix of their names.

        Args:
            needs: fields of `VisionTokens`.
            count: number of layers of the tower.
        """
        sources = {
            "": (self._feature_layers(count)[-1], {"cls_attention", "keys", "attention_received"}),
            "last_": (count - 1, {"last_cls_attention", "last_keys"}),
            "middle_": (at_depth(range(count), MIDDLE), {"middle_attention_received"}),
            "shallow_": (at_depth(range(count), SHALLOW), {"shallow_cls_attention"}),
        }
        return {prefix: at for prefix, (at, fields) in sources.items() if needs & fields}

    def _outlined(self, encoded: EncodedImages, tiles: int) -> ImageOutline:
        """The outline of images that are so many views of the tower's own size, all of which it encodes."""
        count = int(self.view_tokens or 0)
        layers = len(self.model.model.vision_tower.encoder.layers)
        return ImageOutline(encoded, (((count + self.skip),) * tiles,) * layers, tiles * count, tiles * count)

    def _feature_layers(self, count: int) -> list[int]:
        """Indices of the encoder layers whose outputs the projector takes.

        Args:
            count: number of layers of the tower.
        """
        chosen = self.model.config.vision_feature_layer
        listed = [chosen] if isinstance(chosen, int) else chosen
        return [(index if index >= 0 else count + 1 + index) - 1 for index in listed]


@contextlib.contextmanager
def recorded(
    outputs: Iterable[tuple[nn.Module, str]], inputs: Mapping[nn.Module, str], calls: Mapping[nn.Module, str] = EMPTY
) -> Iterator[dict[str, Any]]:
    """Capture inputs and outputs of modules while the context is open.

    A later call of a module replaces what was captured of an earlier one.

    Args:
        outputs: (module, name) pairs whose output to capture; of a tuple its first entry.
        inputs: modules whose first positional argument to capture -> name.
        calls: modules whose keyword arguments to capture -> name.

    Yields:
        A dict of what was captured, by name. It fills when the modules run.
    """
    captured: dict[str, Any] = {}

    def keep_output(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            captured[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_input(name: str, keywords: bool) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            captured[name] = kwargs if keywords else args[0]

        return hook

    handles = [module.register_forward_hook(keep_output(name)) for module, name in outputs]
    for named, keywords in ((inputs, False), (calls, True)):
        handles += [
            module.register_forward_pre_hook(keep_input(name, keywords), with_kwargs=True)
            for module, name in named.items()
        ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def at_depth(layers: Sequence[Any], depth: float) -> Any:
    """The layer at a relative depth of a tower, where 1 is the last layer."""
    return layers[max(round(len(layers) * depth), 1) - 1]


@contextlib.contextmanager
def unread(layers: Sequence[nn.Module]) -> Iterator[None]:
    """While the context is open, layers whose output nobody reads pass on what they get.

    A layer still runs if hooks watch a linear in it, as those of quantization do.

    Args:
        layers: the layers, which take hidden states and return as much.
    """

    def passed_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    with contextlib.ExitStack() as stack:
        for layer in layers:
            linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
            if not any(linear._forward_pre_hooks or linear._forward_hooks for linear in linears):
                stack.enter_context(computing(layer, passed_on))
        yield


def smaller_grid(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """The smallest (height, width) of about the shape of a grid that holds `count` tokens."""
    height, width = grid
    rows = min(math.ceil(math.sqrt(count * height / width)), height)
    return rows, math.ceil(count / rows)


def scaled(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Images [B, C, H, W] at another size (height, width), bilinear, with antialiasing."""
    return interpolate(pixels.float(), size, mode="bilinear", antialias=True).to(pixels.dtype)


def cls_row(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """Attention from the first token (CLS) to every token: [B, N], averaged over heads, in float32.

    Args:
        queries: [B, N, heads * width], unscaled.
        keys: [B, N, heads * width].
        heads: number of heads.
    """
    return received(queries[:, :1], keys, heads)


def received(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """Attention that each token receives, softmax(q k^T / sqrt(d)) averaged over heads and queries: [B, N] in float32.

    Args:
        queries: [B, Q, heads * width], unscaled.
        keys: [B, N, heads * width].
        heads: number of heads.
    """
    query, key = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys))
    logits = (query @ key.mT) / math.sqrt(query.shape[-1])
    return logits.softmax(dim=-1).mean(dim=(1, 2))


def digest(image: Tensor) -> str:
    """Content hash of an image's pixels: 16 hexadecimal digits, the same whatever batch the image came in."""
    return hashlib.sha256(image.float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
