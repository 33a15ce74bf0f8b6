"""The layers of a decoder, and the attention, keys and states of them that a pruner inside the decoder reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qapbench.errors import UserError

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


def device_of(module: nn.Module) -> torch.device:
    """Device of a module's first parameter."""
    return next(iter(module.parameters())).device


def has_linear_attention(config: Any) -> bool:
    """Whether some layers of a model's decoder have linear attention.

    Args:
        config: config of the model.
    """
    return LINEAR in (getattr(config.get_text_config(), "layer_types", None) or ())


class DecoderLayers:
    """The layers of a language model with normalised inputs, q_proj and k_proj, and rotary embeddings (Llama, Qwen2).

    Some of them may have linear attention, which has a state in the place of keys: nothing of it can be read, and it
    goes on from the tokens that it is given, so those that were dropped in front of it are not in it.

    Attributes:
        layers: the decoder layers in order.
        config: config of the language model.
        added_behind: number of first layers behind each of which the model itself adds something to the columns of the
            whole prompt (DeepStack).
        window: number of tokens that the layers with a sliding window see, the token itself among them; None if every
            layer sees all tokens.
        norm: the norm that follows the last layer; None if there is none.
        attending: indices of the layers with keys of single tokens, all but those with linear attention.

    Raises:
        UserError: the decoder is built differently; the message says how.
    """

    def __init__(self, language: Any, added_behind: int = 0) -> None:
        self.added_behind = added_behind
        self.layers: Sequence[Any] = getattr(language, "layers", [])
        if len(self.layers) < 2:
            raise UserError(f"model: {type(language).__name__} has no two decoder layers to drop tokens between")
        self.config: Any = language.config
        self.norm: nn.Module | None = getattr(language, "norm", None)
        kinds = getattr(self.config, "layer_types", None) or [FULL] * len(self.layers)
        if other := sorted(set(kinds) - {FULL, SLIDING, LINEAR}):
            raise UserError(f"model: tokens cannot be dropped between layers of {', '.join(other)}")
        self.window: int | None = self.config.sliding_window if SLIDING in kinds else None
        self.attending = [index for index, kind in enumerate(kinds) if kind != LINEAR]
        for index, layer in enumerate(self.layers):
            attention = getattr(layer, "self_attn", None)
            read = all(hasattr(attention, name) for name in ("q_proj", "k_proj", "head_dim", "scaling"))
            if not read and index in self.attending:
                raise UserError(f"model: {type(layer).__name__} has no q_proj and k_proj to read attention from")
            if not hasattr(layer, "input_layernorm"):
                raise UserError(f"model: {type(layer).__name__} has no input_layernorm")

    def __len__(self) -> int:
        return len(self.layers)

    def normed(self, index: int, hidden: Tensor) -> Tensor:
        """Apply the layer's input norm: the input of its query and key projections for hidden states `hidden`."""
        return self.layers[index].input_layernorm(hidden)

    def check_drop(self, name: str, index: int, read: int | None) -> None:
        """Check that tokens can be dropped in front of a layer.

        Args:
            name: name of the pruner, for the message.
            index: index of the layer.
            read: index of the layer whose queries or keys the pruner reads; None if it reads none.

        Raises:
            UserError: it reads a layer with linear attention, or a KV cache could not say how long the prompt is.
        """
        listed = ", ".join(str(at + 1) for at in self.attending)
        if read is not None and read not in self.attending:
            raise UserError(
                f"prune.method: {name} reads attention of decoder layer {read + 1}, which has linear attention and "
                f"keeps no keys of single tokens; layers that do are {listed}"
            )
        if index <= self.attending[0]:
            raise UserError(
                f"prune.method: {name} drops tokens behind decoder layer {index}; the first drop can be behind layer "
                f"{self.attending[0] + 1}, the first one without linear attention, where the KV cache counts the prompt"
            )

    def projections(self, index: int) -> tuple[nn.Module, ...]:
        """The layer's modules that compute queries and keys, before the rotary embedding; none of linear attention."""
        if index not in self.attending:
            return ()
        attention = self.layers[index].self_attn
        return attention.q_proj, attention.k_proj

    def readers(self, index: int) -> list[nn.Linear]:
        """The layer's linears that read the output of its input norm: query, key and value.

        Raises:
            UserError: the layer has no such linears.
        """
        layer = self.layers[index]
        attention = getattr(layer, "self_attn", layer)
        named = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        found = [linear for linear in named if isinstance(linear, nn.Linear)]
        if len(found) != len(named):
            raise UserError(f"model: {type(attention).__name__} has no linears q_proj, k_proj and v_proj")
        return found

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
        query = _queries(attention, queries).mean(dim=0, keepdim=True)
        return _logits(attention, query, _keys(attention, keys)).softmax(dim=-1).mean(dim=(0, 1))[0]

    def rotated_keys(self, index: int, keys: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Keys of a layer after the rotary embedding, heads side by side: [S, key heads * width], in float32.

        Args:
            index: index of the layer.
            keys: [S, key heads * width] keys, before the rotary embedding.
            rotary: cosine and sine of their places, each [S, width].
        """
        return _rotated(_keys(self.layers[index].self_attn, keys), *rotary).flatten(1)


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
    query = _rotated(_queries(attention, queries), cos[at], sin[at])
    key = _rotated(_keys(attention, keys), cos, sin)
    if seen is None:
        seen = torch.arange(len(keys), device=at.device) <= at.unsqueeze(1)
    return _logits(attention, query, key).masked_fill(~seen, float("-inf")).softmax(dim=-1).mean(dim=(0, 1))


def _queries(attention: Any, states: Tensor) -> Tensor:
    """Queries [S, heads, width] in float32, normed as the layer does it, without the gates beside them if it has such.

    A gated attention (Qwen3-Next, Qwen3.5) has as many gates as values, behind the query of each head.
    """
    width = attention.head_dim
    gated = attention.q_proj.out_features == 2 * attention.o_proj.in_features
    return _normed(attention, "q_norm", states.unflatten(-1, (-1, width * (1 + gated)))[..., :width])


def _keys(attention: Any, states: Tensor) -> Tensor:
    """Keys [S, key heads, width] in float32, normed as the layer does it."""
    return _normed(attention, "k_norm", states.unflatten(-1, (-1, attention.head_dim)))


def _normed(attention: Any, norm: str, heads: Tensor) -> Tensor:
    normed = getattr(attention, norm, None)
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
