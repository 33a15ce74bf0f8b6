"""Quantizes the KV cache that the layers of the language model read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from qapbench.errors import UserError
from qapbench.methods.kv import KVFormat, KVSide

from .call_tokens import TokenContext
from .measured_bits import most_levels
from .receipts import KVUse

SIDES = ("keys", "values")


class QuantizedLayer(DynamicLayer):
    """The cache of one decoder layer: what is read of it is rounded as if it had been stored in few bits.

    `keys` and `values` hold all tokens as they were computed, so that tokens can be taken back. Which of them are
    quantized depends on their number alone, and each is quantized once. Padding counts for nothing.

    Args:
        format: how the cache is stored.
        tokens: says which tokens of the present call are padding.
        index: index of the layer.
        use: receives what the first prompt occupies.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, format: KVFormat, tokens: TokenContext, index: int, use: KVUse) -> None:
        super().__init__()
        self.format, self.tokens, self.index, self.use = format, tokens, index, use
        self.valid: Tensor | None = None  # [B, T] bool; None as long as there is no padding
        self.scales: dict[str, Tensor] = {}  # by side, [B, 1, 1, 1]
        self.ready: dict[str, Tensor] = {}  # by side, the quantized tokens [B, H, n, D], if there is no padding

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new tokens [B, H, n, D], and return keys and values [B, H, T, D] as the present call reads them."""
        past = self.get_seq_length()
        super().update(key_states, value_states, *args, **kwargs)
        self._note_padding(past, key_states)
        if past == 0:
            self._begin()
        # New tokens read what was stored before them. Without a residual they are stored at once.
        stored = self.keys.shape[2] if past == 0 or self.format.residual == 0 else past
        keys, values = (self._read(name, stored) for name in SIDES)
        if past == 0:
            self._measure(keys, values)
            if self.format.prefill == "exact":
                return self.keys, self.values
        return keys, values

    def _note_padding(self, past: int, new: Tensor) -> None:
        """Note which of the new tokens are padding. A token that is generated never is."""
        batch, count = new.shape[0], new.shape[2]
        if past == 0:
            self.valid = None
        told = self.tokens() if past == 0 or count > 1 else None
        fresh = told.valid.to(new.device) if told is not None and told.valid.shape == (batch, count) else None
        if self.valid is None and (fresh is None or bool(fresh.all())):
            return
        whole = torch.ones(batch, past, dtype=torch.bool, device=new.device) if self.valid is None else self.valid
        self.valid = torch.cat([whole, whole.new_ones(batch, count) if fresh is None else fresh], dim=1)

    def _begin(self) -> None:
        """Fix the scales that a sample keeps."""
        self.scales, self.ready = {}, {}
        for name in SIDES:
            side, x = self._side(name), getattr(self, name)
            if side is not None and side.granularity == "tensor":
                self.scales[name] = torch.stack([side.scale(x[row][:, self._places(row)]) for row in range(len(x))])

    def _side(self, name: str) -> KVSide | None:
        side: KVSide | None = getattr(self.format, name)
        return side

    def _places(self, row: int, columns: int | None = None) -> Tensor:
        """Places of a row's tokens, without padding, among the first columns."""
        count = self.keys.shape[2] if columns is None else columns
        if self.valid is None:
            return torch.arange(count, device=self.keys.device)
        return self.valid[row, :count].nonzero()[:, 0]

    def _read(self, name: str, columns: int) -> Tensor:
        """Keys or values [B, H, T, D] with the first columns as they are stored."""
        side, x = self._side(name), getattr(self, name)
        if side is None:
            return x
        scale = self.scales.get(name)
        if self.valid is not None:
            out = x.clone()
            for row in range(len(x)):
                places = self._places(row, columns)
                places = places[: self.format.stored(side, len(places))]
                out[row, :, places] = side(x[row][:, places], None if scale is None else scale[row])
            return out
        stored = self.format.stored(side, columns)
        ready = self.ready.get(name, x[:, :, :0])
        if ready.shape[2] < stored:
            ready = torch.cat([ready, side(x[:, :, ready.shape[2] : stored], scale)], dim=2)
        self.ready[name] = ready = ready[:, :, :stored]
        return torch.cat([ready, x[:, :, stored:]], dim=2)

    def _measure(self, keys: Tensor, values: Tensor) -> None:
        """Note what the prompt of the first row occupies, if this layer has not noted any yet."""
        if self.index in self.use.layers:
            return
        full, places = torch.finfo(keys.dtype).bits, self._places(0)
        held = self._held(len(places))
        bits, quantized, levels = [], [], []
        for name, x in zip(SIDES, (keys, values), strict=True):
            side = self._side(name)
            read = 0 if side is None else self.format.stored(side, len(places))
            count = max(read - (len(places) - held), 0)
            each = full if side is None else side.stored_bits(x.shape[1], count, x.shape[3], full)
            bits.append((count * each + (held - count) * full) / max(held, 1))
            quantized.append(count)
            levels.append(0 if side is None else most_levels(x[0][:, places[:read]], side))
        self.use.note(self.index, held, sum(bits) / 2, sum(quantized) / 2, (levels[0], levels[1]))

    def _held(self, count: int) -> int:
        """How many of a sequence's tokens the cache would hold."""
        return count

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change what is kept of each row as keys and values were changed."""
        self.ready = {}
        self.valid = None if self.valid is None else change(self.valid)
        self.scales = {name: change(scale) for name, scale in self.scales.items()}

    def reorder_cache(self, beam_idx: Any) -> None:
        """Put the rows of beams in another order."""
        super().reorder_cache(beam_idx)
        self._change_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._change_rows(lambda x: x[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens back."""
        super().crop(tokens_to_remove)
        if self.valid is not None:
            self.valid = self.valid[:, : self.get_seq_length()]


class QuantizedWindow(QuantizedLayer):
    """The cache of a layer with a sliding window: read as `QuantizedLayer`, and no farther back than the window.

    Which tokens are quantized, and in which groups, depends on the whole sequence, as in a layer without a window. The
    cache would hold the newest `window - 1` tokens.

    Args:
        window: number of tokens that the layer sees, the token itself among them.
    """

    is_sliding = True

    def __init__(self, format: KVFormat, tokens: TokenContext, index: int, use: KVUse, window: int) -> None:
        super().__init__(format, tokens, index, use)
        self.sliding_window = window

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new tokens [B, H, n, D], and return those that they see, for which `get_mask_sizes` makes the mask."""
        seen = self.sliding_window - 1 + key_states.shape[2]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys[:, :, -seen:], values[:, :, -seen:]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that a call of this many tokens reads, and the place of the first of them."""
        past = self.get_seq_length()
        return self._held(past) + query_length, past - self._held(past)

    def _held(self, count: int) -> int:
        return min(count, self.sliding_window - 1)


@contextlib.contextmanager
def quantized_cache(language: Any, format: KVFormat, tokens: TokenContext, use: KVUse) -> Iterator[None]:
    """While the context is open, every KV cache that the language model fills is quantized.

    A cache that was filled inside the context stays as it is afterwards.

    Args:
        language: the language model.
        format: how caches are stored.
        tokens: says which tokens of a call its present layer holds.
        use: receives what the first prompt occupies.
    """

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is None:
            if kwargs.get("use_cache") is False and format.prefill == "exact":
                return None  # nothing reads a cache
            cache = DynamicCache(config=language.config)
        _convert(cache, len(language.layers), format, tokens, use)
        return args, {**kwargs, "past_key_values": cache}

    handle = language.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _convert(cache: Any, depth: int, format: KVFormat, tokens: TokenContext, use: KVUse) -> None:
    """Replace the layers of a cache by quantized ones, in place. What they hold already counts as one prompt.

    Raises:
        UserError: a layer is of another kind, such as a static one, or has dropped tokens behind its window already.
    """
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layers += [DynamicLayer() for _ in range(depth - len(cache.layers))]
    for index, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) is LinearAttentionLayer:
            continue  # a state that every token changes, with no keys and values of single tokens
        if isinstance(layer, QuantizedLayer) and layer.format == format:
            layer.tokens = tokens
            continue
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, QuantizedLayer, QuantizedWindow):
            kind = type(layer).__name__
            raise UserError(f"quantize.kv: the layers need a dynamic KV cache, not {kind}")
        window = getattr(layer, "sliding_window", None)
        new = (
            QuantizedLayer(format, tokens, index, use)
            if window is None
            else QuantizedWindow(format, tokens, index, use, window)
        )
        cache.layers[index] = new
        if layer.is_initialized and layer.get_seq_length():
            if layer.get_seq_length() > layer.keys.shape[2]:
                raise UserError("quantize.kv: this KV cache has dropped tokens behind its window; fill a new one")
            new.lazy_initialization(layer.keys, layer.values)
            new.keys, new.values = layer.keys, layer.values
            new._begin()
    if not getattr(cache, "layers", ()):
        raise UserError(f"quantize.kv: the layers need a dynamic KV cache, not {type(cache).__name__}")
