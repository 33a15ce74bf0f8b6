"""Models of LLaVA's build: a CLIP or SigLIP tower, patches of one layer, a projector, a language model."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from qapbench.errors import UserError

from .family import Family

MIDDLE = 9 / 24  # depth of the layer that HiPrune finds objects in
CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"
EMPTY: Mapping[nn.Module, str] = {}
RECEIVED = "the tower has no CLS token; attention received from all patches stands in"


class TowerFamily(Family):
    """What LLaVA's relatives have in common. Their towers are called with one tile a row; `fields` says what was seen.

    Raises:
        UserError: the tower is neither CLIP nor SigLIP, or its CLS token is not dropped.
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
        core = self.model.model
        return {
            "language": core.language_model, "projector": core.multi_modal_projector, "vision": core.vision_tower,
        }  # fmt: skip

    @property
    def vision(self) -> Any:
        """Config of the tower."""
        return self.model.config.vision_config

    @property
    def skip(self) -> int:
        """Tokens of the tower's own in front of the patches: CLIP's CLS."""
        return int(self.vision.model_type == CLIP)

    @property
    def offers(self) -> frozenset[str]:
        fields = {"patches", "image_ids", "grid", "cls_attention", "keys", "last_cls_attention", "last_keys"}
        fields |= {"attention_received", "middle_attention_received"}
        return frozenset(fields | {"cls_token"} if self.skip else fields)

    @property
    def stand_ins(self) -> Mapping[str, str]:
        return {} if self.skip else dict.fromkeys(("cls_attention", "last_cls_attention"), RECEIVED)

    @property
    def clip_width(self) -> int | None:
        return self.vision.hidden_size if self.skip else None

    @property
    def view_tokens(self) -> int | None:
        return (self.vision.image_size // self.vision.patch_size) ** 2

    def project(self, patches: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(patches)

    def fields(self, seen: Mapping[str, Tensor], needs: frozenset[str], pixels: Tensor) -> dict[str, Any]:
        """Fields of VisionTokens, from what `recording` kept of T tiles `pixels` [T, 3, H, W]."""
        heads, skip = self.vision.num_attention_heads, self.skip
        found: dict[str, Any] = {"projected": seen["projected"]}
        side = math.isqrt(found["projected"].shape[1])
        if side * side == found["projected"].shape[1]:
            found["grid"] = (side, side)
        if "patches" in needs:
            found["patches"] = seen["patches"]
        if "cls_token" in needs:
            found["cls_token"] = seen["hidden"][:, 0]
        if "keys" in needs:
            found |= {"keys": seen["keys"][:, skip:], "heads": heads}
        if "last_keys" in needs:
            found["last_keys"] = seen["last_keys"][:, skip:]
        row = cls_row if skip else received
        if "cls_attention" in needs:
            found["cls_attention"] = row(seen["queries"], seen["keys"], heads)[:, skip:]
        if "last_cls_attention" in needs:
            found["last_cls_attention"] = row(seen["last_queries"], seen["last_keys"], 1)[:, skip:]
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
        """Hooks on the encoder layers that are needed and the projector; attention itself stays SDPA or flash."""
        self.check_offered(needs)
        projector, layers = self.model.model.multi_modal_projector, self.model.model.vision_tower.encoder.layers
        wanted: list[tuple[nn.Module, str]] = [(projector, "projected")]
        layer = layers[self._feature_layer(len(layers))]
        if "cls_token" in needs:
            wanted.append((layer, "hidden"))
        for prefix, of, fields in (
            ("", layer, {"cls_attention", "keys", "attention_received"}),
            ("last_", layers[-1], {"last_cls_attention", "last_keys"}),
            ("middle_", layers[max(round(len(layers) * MIDDLE), 1) - 1], {"middle_attention_received"}),
        ):
            if needs & fields:
                attention = of.self_attn
                wanted += [(attention.q_proj, f"{prefix}queries"), (attention.k_proj, f"{prefix}keys")]
        with recorded(wanted, {projector: "patches"} if "patches" in needs else {}) as seen:
            yield seen

    def _feature_layer(self, count: int) -> int:
        """Index of the encoder layer whose output the projector takes (the last one where there are several)."""
        chosen = self.model.config.vision_feature_layer
        index = chosen if isinstance(chosen, int) else chosen[-1]
        return (index if index >= 0 else count + 1 + index) - 1


@contextlib.contextmanager
def recorded(
    outputs: Iterable[tuple[nn.Module, str]], inputs: Mapping[nn.Module, str], calls: Mapping[nn.Module, str] = EMPTY
) -> Iterator[dict[str, Any]]:
    """A dict that fills while these modules run: with what they give, what they are given, the keywords of a call."""
    seen: dict[str, Any] = {}

    def keep_output(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def keep_input(name: str, keywords: bool) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            seen[name] = kwargs if keywords else args[0]

        return hook

    handles = [module.register_forward_hook(keep_output(name)) for module, name in outputs]
    for named, keywords in ((inputs, False), (calls, True)):
        handles += [
            module.register_forward_pre_hook(keep_input(name, keywords), with_kwargs=True)
            for module, name in named.items()
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def cls_row(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """[B, N]: row of the first token (CLS) in softmax(q k^T / sqrt(d)), mean over heads. Float32."""
    return received(queries[:, :1], keys, heads)


def received(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """[B, N]: what each token gets of softmax(q k^T / sqrt(d)), mean over heads and queries. Float32."""
    query, key = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys))
    logits = (query @ key.mT) / math.sqrt(query.shape[-1])
    return logits.softmax(dim=-1).mean(dim=(1, 2))


def digest(image: Tensor) -> str:
    """Content hash of pixels, whatever batch they came in."""
    return hashlib.sha256(image.float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
