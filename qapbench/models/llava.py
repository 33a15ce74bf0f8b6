"""LLaVA-1.5 and whatever else loads as `LlavaForConditionalGeneration` with a CLIP vision tower."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from qapbench.errors import UserError
from qapbench.tokens import VisionTokens

from .family import Family, family

MIDDLE = 9 / 24  # depth of the layer that HiPrune finds objects in
CLIP_L_336 = "openai/clip-vit-large-patch14-336"


@family("llava")
class Llava(Family):
    """CLIP tower -> patches of one layer, CLS dropped -> two-layer projector -> language model."""

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
    def image_token(self) -> int:
        return self.model.config.image_token_id

    @property
    def offers(self) -> frozenset[str]:
        fields = {"patches", "image_ids", "grid"}  # CLIP's patch grid is square
        vision = self.model.config.vision_config
        if vision.model_type == "clip_vision_model":
            fields |= {"cls_attention", "keys", "cls_token", "last_cls_attention", "last_keys"}
            fields |= {"attention_received", "middle_attention_received"}
        return frozenset(fields)

    @classmethod
    def default_text_tower(cls, config: Mapping[str, Any]) -> str | None:
        vision = config.get("vision_config") or {}
        shape = tuple(vision.get(key) for key in ("hidden_size", "num_hidden_layers", "image_size", "patch_size"))
        return CLIP_L_336 if shape == (1024, 24, 336, 14) else None

    def complete(self, processor: Any) -> None:
        super().complete(processor)
        config = self.model.config
        if processor.patch_size is None:
            processor.patch_size = config.vision_config.patch_size
            processor.num_additional_image_tokens = 1  # CLIP's CLS, which the strategy below drops again
        if processor.vision_feature_select_strategy is None:
            processor.vision_feature_select_strategy = config.vision_feature_select_strategy

    @torch.no_grad()
    def see(self, pixels: Tensor, needs: frozenset[str]) -> VisionTokens:
        if missing := needs - self.offers:
            raise UserError(f"model: this vision tower cannot record {', '.join(sorted(missing))}")
        with self._recording(needs) as seen:
            outputs = self.model.model.get_image_features(pixel_values=pixels, return_dict=True)
        projected = torch.stack(list(outputs.pooler_output))
        fields: dict[str, Any] = {"projected": projected}
        heads = self.model.config.vision_config.num_attention_heads
        side = math.isqrt(projected.shape[1])
        if side * side == projected.shape[1]:
            fields["grid"] = (side, side)
        if "patches" in needs:
            fields["patches"] = seen["patches"]
        if "cls_token" in needs:
            fields["cls_token"] = seen["hidden"][:, 0]
        if "keys" in needs:
            fields |= {"keys": seen["keys"][:, 1:], "heads": heads}
        if "cls_attention" in needs:
            fields["cls_attention"] = _cls_row(seen["queries"], seen["keys"], heads)
        if "last_keys" in needs:
            fields["last_keys"] = seen["last_keys"][:, 1:]
        if "last_cls_attention" in needs:
            fields["last_cls_attention"] = _cls_row(seen["last_queries"], seen["last_keys"], heads=1)
        if "attention_received" in needs:
            fields["attention_received"] = _received(seen["queries"], seen["keys"], heads)
        if "middle_attention_received" in needs:
            fields["middle_attention_received"] = _received(seen["middle_queries"], seen["middle_keys"], heads)
        if "image_ids" in needs:
            fields["image_ids"] = tuple(_digest(image) for image in pixels)
        return VisionTokens(**fields)

    def project(self, patches: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(patches)

    def encoded(self, features: list[Tensor]) -> dict[str, Any]:
        # Annotated as one tensor upstream, but LLaVA's own code fills it with a list of tensors.
        pooled: Any = features
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=pooled)}}

    @contextlib.contextmanager
    def _recording(self, needs: frozenset[str]) -> Iterator[dict[str, Tensor]]:
        """Hooks on the encoder layers that are needed and the projector; attention itself stays SDPA or flash."""
        seen: dict[str, Tensor] = {}
        layer = self._feature_layer()

        def keep(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                seen[name] = output[0] if isinstance(output, tuple) else output

            return hook

        def keep_input(module: nn.Module, args: Any) -> None:
            seen["patches"] = args[0]

        handles = [
            layer.register_forward_hook(keep("hidden")),
            layer.self_attn.q_proj.register_forward_hook(keep("queries")),
            layer.self_attn.k_proj.register_forward_hook(keep("keys")),
            self.model.model.multi_modal_projector.register_forward_pre_hook(keep_input),
        ]
        layers = self.model.model.vision_tower.encoder.layers
        more = {}
        if needs & {"last_cls_attention", "last_keys"}:
            more["last"] = layers[-1]
        if "middle_attention_received" in needs:
            more["middle"] = layers[max(round(len(layers) * MIDDLE), 1) - 1]
        for name, other in more.items():
            handles.append(other.self_attn.q_proj.register_forward_hook(keep(f"{name}_queries")))
            handles.append(other.self_attn.k_proj.register_forward_hook(keep(f"{name}_keys")))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _feature_layer(self) -> Any:
        """The encoder layer whose output the projector takes (the last one where there are several)."""
        chosen = self.model.config.vision_feature_layer
        index = chosen if isinstance(chosen, int) else chosen[-1]
        layers = self.model.model.vision_tower.encoder.layers
        return layers[(index if index >= 0 else len(layers) + 1 + index) - 1]


def _cls_row(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """[B, N]: row of the CLS token in softmax(q k^T / sqrt(d)), mean over heads, CLS column dropped. Float32."""
    query = queries[:, :1].float().unflatten(-1, (heads, -1)).transpose(1, 2)
    key = keys.float().unflatten(-1, (heads, -1)).transpose(1, 2)
    logits = (query @ key.mT) / math.sqrt(query.shape[-1])
    return logits.softmax(dim=-1).mean(dim=1)[:, 0, 1:]


def _received(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """[B, N]: what each patch gets of softmax(q k^T / sqrt(d)), mean over heads and queries (CLS too). Float32."""
    query, key = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys))
    logits = (query @ key.mT) / math.sqrt(query.shape[-1])
    return logits.softmax(dim=-1).mean(dim=(1, 2))[:, 1:]


def _digest(image: Tensor) -> str:
    return hashlib.sha256(image.float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
