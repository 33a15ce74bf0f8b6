"""The layers of a decoder, and the few rows of their attention that a pruner inside it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qapbench.errors import UserError


class DecoderLayers:
    """A language model whose layers call q_proj and k_proj on normalised inputs and rotate halves (Llama, Qwen2).

    Raises:
        UserError: the decoder is built in another way, and says in which.
    """

    def __init__(self, language: Any) -> None:
        self.layers: Sequence[Any] = getattr(language, "layers", [])
        if len(self.layers) < 2:
            raise UserError(f"model: {type(language).__name__} has no two decoder layers to drop tokens between")
        for layer in self.layers:
            attention = getattr(layer, "self_attn", None)
            if not all(hasattr(attention, name) for name in ("q_proj", "k_proj", "head_dim", "scaling")):
                raise UserError(f"model: {type(layer).__name__} has no q_proj and k_proj to read attention from")
            if not hasattr(layer, "input_layernorm"):
                raise UserError(f"model: {type(layer).__name__} has no input_layernorm")
        self.config: Any = language.config
        kinds = set(getattr(self.config, "layer_types", None) or ["full_attention"])
        if other := sorted(kinds - {"full_attention"}):
            raise UserError(f"model: tokens cannot be dropped between layers of {', '.join(other)}")

    def __len__(self) -> int:
        return len(self.layers)

    def normed(self, index: int, hidden: Tensor) -> Tensor:
        """What the layer's projections get of its input."""
        return self.layers[index].input_layernorm(hidden)

    def projections(self, index: int) -> tuple[nn.Module, nn.Module]:
        """The modules that make queries and keys, before their rotation."""
        attention = self.layers[index].self_attn
        return attention.q_proj, attention.k_proj

    def rows(self, index: int, queries: Tensor, keys: Tensor, rotary: tuple[Tensor, Tensor], at: Tensor) -> Tensor:
        """[R, S] rows of the layer's attention over one sequence, mean over heads, in float32.

        Args:
            queries: [R, heads * width] of the places `at`, before rotation.
            keys: [S, key heads * width] of all places, before rotation.
            rotary: cosine and sine of every place, [S, width].
            at: [R] places of the queries; a row sees itself and what stands before it.
        """
        attention = self.layers[index].self_attn
        cos, sin = rotary
        query = self._rotated(queries, getattr(attention, "q_norm", None), attention.head_dim, cos[at], sin[at])
        key = self._rotated(keys, getattr(attention, "k_norm", None), attention.head_dim, cos, sin)
        groups = query.shape[1] // key.shape[1]
        logits = torch.einsum("rhgd,shd->hgrs", query.unflatten(1, (-1, groups)), key) * attention.scaling
        behind = torch.arange(len(keys), device=at.device) > at.unsqueeze(1)
        return logits.masked_fill(behind, float("-inf")).softmax(dim=-1).mean(dim=(0, 1))

    @staticmethod
    def _rotated(states: Tensor, norm: nn.Module | None, width: int, cos: Tensor, sin: Tensor) -> Tensor:
        """[S, heads, width] in float32, with the rotary embedding applied as Llama does: halves of a head in pairs."""
        heads = states.unflatten(-1, (-1, width))
        heads = (norm(heads) if norm is not None else heads).float()
        turned, rest = heads.split([cos.shape[-1], width - cos.shape[-1]], dim=-1)
        one, two = turned.chunk(2, dim=-1)
        cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
        return torch.cat([turned * cos + torch.cat([-two, one], dim=-1) * sin, rest], dim=-1)
