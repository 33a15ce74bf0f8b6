"""What a KV cache holds of a pruned prompt, so that a later call on the same cache goes on where it ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qapbench.errors import UserError


@dataclass(frozen=True)
class CachedPrompt:
    """A pruned prompt whose keys and values are the first ones of a KV cache.

    Attributes:
        ids: [B, L] token ids of the caller's prompt.
        short: [B, S] those of the prompt as the decoder got it.
        mask: [B, S] its attention mask.
        positions: [..., B, S] its positions.
        typed: inputs with one value per token, by name, each [B, S] as the decoder got it.
        counted: whether they count the tokens that are left, so that the caller's own positions would not follow them.
        decoder: what pruned it between the decoder's layers; None for pruning in front of the decoder.
    """

    ids: Tensor
    short: Tensor
    mask: Tensor
    positions: Tensor
    typed: dict[str, Tensor]
    counted: bool
    decoder: Any = None

    @property
    def whole(self) -> bool:
        """Whether the cache's first layer holds the caller's prompt as it was, and later ones were pruned."""
        return self.decoder is not None and torch.equal(self.ids, self.short)

    def check(self, cache: Any, rows: int, decoder: Any) -> None:
        """Check that a call can go on from the cache.

        Args:
            cache: the KV cache.
            rows: number of rows of the call.
            decoder: what prunes between the decoder's layers now.

        Raises:
            UserError: it cannot.
        """
        if self.decoder is not None and self.decoder is not decoder:
            raise UserError("past_key_values: the cache was pruned between layers in another context, so start anew")
        # Layers with linear attention hold no keys.
        held = len(next(keys for layer in cache.layers if (keys := getattr(layer, "keys", None)) is not None))
        if not held == rows == len(self.ids):
            raise UserError(f"past_key_values: the cache holds {held} rows of {len(self.ids)} prompts, the call {rows}")
        if cache.get_seq_length() < self.short.shape[1]:
            raise UserError("past_key_values: the cache was cut into its pruned prompt, so start anew")

    def turn(self, cache: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `generate` for a further turn, with the pruned prompt in place of the caller's.

        Args:
            cache: the KV cache.
            kwargs: the caller's arguments. Their `input_ids` are the whole conversation, or with a mask over all of it
                only its new tokens.

        Raises:
            UserError: the conversation does not begin with the prompt, or positions are given.
        """
        ids, mask, length = kwargs["input_ids"], kwargs.get("attention_mask"), self.ids.shape[1]
        if kwargs.get("position_ids") is not None:
            raise UserError("position_ids: leave them out of a further turn; they follow from the pruned prompt")
        fresh = mask is not None and mask.shape[1] > ids.shape[1]
        if not fresh and not (ids.shape[1] > length and torch.equal(ids[:, :length], self.ids.to(ids.device))):
            raise UserError("input_ids: a further turn has to begin with the prompt that the KV cache holds")
        rest = torch.ones_like(ids[:, length:]) if mask is None else mask[:, length:]
        if cache.get_seq_length() >= self.short.shape[1] + rest.shape[1]:
            raise UserError("input_ids: the KV cache holds all of them already; a further turn needs new tokens")
        types = {
            name: torch.cat([held, kwargs[name][:, -rest.shape[1] :]], dim=1)
            for name, held in self.typed.items()
            if kwargs.get(name) is not None
        }
        return {
            **kwargs,
            **types,
            "input_ids": ids if fresh else torch.cat([self.short, ids[:, length:]], dim=1),
            "attention_mask": torch.cat([self.mask, rest], dim=1),
            "position_ids": torch.cat([self.positions, self._behind(rest)], dim=-1),
        }

    def following(self, cache: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `forward` for new tokens behind the cache.

        Args:
            cache: the KV cache.
            kwargs: the caller's arguments, whose mask may be that of the whole or of the pruned prompt.

        Raises:
            UserError: the mask has another length, or positions are given that do not follow the pruned prompt's.
        """
        new, mask, prompt = kwargs["input_ids"].shape[1], kwargs.get("attention_mask"), self.short.shape[1]
        behind = cache.get_seq_length() - prompt + new
        if mask is None:
            rest = torch.ones(len(self.ids), behind, dtype=self.mask.dtype, device=self.mask.device)
        elif mask.ndim == 2 and mask.shape[1] in (self.ids.shape[1] + behind, prompt + behind):
            rest = mask[:, -behind:]
        else:
            wanted = f"{self.ids.shape[1] + behind} or {prompt + behind}"
            raise UserError(f"attention_mask: expected {wanted} columns behind a pruned prompt, got {list(mask.shape)}")
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = self._behind(rest)[..., -new:]
        elif self.counted:
            raise UserError("position_ids: leave them out behind a pruned prompt; they count the tokens that are left")
        return {**kwargs, "attention_mask": torch.cat([self.mask, rest], dim=1), "position_ids": positions}

    def _behind(self, rest: Tensor) -> Tensor:
        """Positions [..., B, n] of the columns behind the prompt, from their mask [B, n]."""
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        last = (self.mask * columns).argmax(dim=1)
        place = last.view(-1, 1).expand(*self.positions.shape[:-1], 1)
        return self.positions.gather(-1, place) + rest.cumsum(dim=1)


CACHES: WeakKeyDictionary[Any, CachedPrompt] = WeakKeyDictionary()
"""KV caches of pruned prompts. They outlive the context in which they were filled."""


def cache_of(output: Any) -> Any:
    """The KV cache in the output of `forward` or `generate`; None if there is none."""
    return getattr(output, "past_key_values", None)


def filled(cache: Any) -> bool:
    """Whether a KV cache that a caller gave holds anything."""
    return cache is not None and cache.get_seq_length() > 0
