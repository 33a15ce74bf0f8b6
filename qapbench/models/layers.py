"""The layers of a decoder, and the attention, keys and states of them that a pruner inside the decoder reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qapbench.errors import UserError

SLIDING = "sliding_attention"


class DecoderLayers:
    """The layers of a language model with normalised inputs, q_proj and k_proj, and rotary embeddings (Llama, Qwen2).

    Attributes:
        layers: the decoder layers in order.
        config: config of the language model.
        added_behind: number of first layers behind each of which the model itself adds something to the columns of the
            whole prompt (DeepStack).
        window: number of tokens that the layers with a sliding window see, the token itself among them; None if every
            layer sees all tokens.
        norm: the norm that follows the last layer; None if there is none.

    Raises:
        UserError: the decoder is built differently; the message says how.
    """

    def __init__(self, language: Any, added_behind: int = 0) -> None:
        self.added_behind = added_behind
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
        self.norm: nn.Module | None = getattr(language, "norm", None)
        kinds = set(getattr(self.config, "layer_types", None) or ["full_attention"])
        if other := sorted(kinds - {"full_attention", SLIDING}):
            raise UserError(f"model: tokens cannot be dropped between layers of {', '.join(other)}")
        self.window: int | None = self.config.sliding_window if SLIDING in kinds else None

    def __len__(self) -> int:
        return len(self.layers)

    def normed(self, index: int, hidden: Tensor) -> Tensor:
        """Apply the layer's input norm: the input of its query and key projections for hidden states `hidden`."""
        return self.layers[index].input_layernorm(hidden)

    def projections(self, index: int) -> tuple[nn.Module, nn.Module]:
        """The layer's modules that compute queries and keys, before the rotary embedding."""
        attention = self.layers[index].self_attn
        return attention.q_proj, attention.k_proj

    def rows(self, index: int, queries: Tensor, keys: Tensor, rotary: tuple[Tensor, Tensor], at: Tensor) -> Tensor:
        """Compute rows of a layer's attention matrix over one sequence, see `attention_rows`.

        Args:
            index: index of the layer.
            queries: [R, heads * width] queries at the places `at`, before the rotary embedding.
            keys: [S, key heads * width] keys at all places, before the rotary embedding.
            rotary: cosine and sine of all places, each [S, width].
            at: [R] places of the queries.
        """
        return attention_rows(self.layers[index].self_attn, queries, keys, rotary, at)

    def context(self, index: int, queries: Tensor, keys: Tensor) -> Tensor:
        """Attention of the mean query to all places, before the rotary embedding: [S], averaged over heads, in float32.

        Args:
            index: index of the layer.
            queries: [S, heads * width] queries of all places, before the rotary embedding.
            keys: [S, key heads * width] keys of all places, before the rotary embedding.
        """
        attention = self.layers[index].self_attn
        query = _heads(attention, "q_norm", queries).mean(dim=0, keepdim=True)
        return _logits(attention, query, _heads(attention, "k_norm", keys)).softmax(dim=-1).mean(dim=(0, 1))[0]

    def rotated_keys(self, index: int, keys: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Keys of a layer after the rotary embedding, heads side by side: [S, key heads * width], in float32.

        Args:
            index: index of the layer.
            keys: [S, key heads * width] keys, before the rotary embedding.
            rotary: cosine and sine of their places, each [S, width].
        """
        return _rotated(_heads(self.layers[index].self_attn, "k_norm", keys), *rotary).flatten(1)


def attention_rows(
    attention: Any,
    queries: Tensor,
    keys: Tensor,
    rotary: tuple[Tensor, Tensor],
    at: Tensor,
    seen: Tensor | None = None,
) -> Tensor:
    """Compute rows of an attention matrix over one sequence: [R, S], averaged over heads, in float32.

    Args:
        attention: the attention module of a decoder layer.
        queries: [R, heads * width] queries at the places `at`, before the rotary embedding.
        keys: [S, key heads * width] keys at all places, before the rotary embedding.
        rotary: cosine and sine of all places, each [S, width].
        at: [R] places of the queries.
        seen: [R, S] bool, True at the places that a query attends to; None stands for itself and the places before it.
    """
    cos, sin = rotary
    query = _rotated(_heads(attention, "q_norm", queries), cos[at], sin[at])
    key = _rotated(_heads(attention, "k_norm", keys), cos, sin)
    if seen is None:
        seen = torch.arange(len(keys), device=at.device) <= at.unsqueeze(1)
    return _logits(attention, query, key).masked_fill(~seen, float("-inf")).softmax(dim=-1).mean(dim=(0, 1))


def _heads(attention: Any, norm: str, states: Tensor) -> Tensor:
    """Split queries or keys into heads, and apply the layer's norm of them if it has one: [S, heads, width]."""
    heads, normed = states.unflatten(-1, (-1, attention.head_dim)), getattr(attention, norm, None)
    return (normed(heads) if normed is not None else heads).float()


def _logits(attention: Any, query: Tensor, key: Tensor) -> Tensor:
    """Logits [key heads, group, R, S] of attention from queries [R, heads, width] to keys [S, key heads, width]."""
    groups = query.shape[1] // key.shape[1]
    logits = torch.einsum("rhgd,shd->hgrs", query.unflatten(1, (-1, groups)), key)
    return logits * attention.scaling


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to heads [S, heads, width], in float32.

    As in Llama, the two halves of a head form the pairs that are rotated.
    """
    turned, rest = heads.split([cos.shape[-1], heads.shape[-1] - cos.shape[-1]], dim=-1)
    one, two = turned.chunk(2, dim=-1)
    cos, sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    return torch.cat([turned * cos + torch.cat([-two, one], dim=-1) * sin, rest], dim=-1)
