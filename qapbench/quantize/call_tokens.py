"""Which tokens the present layer of the language model holds, for activations whose quantization depends on it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qapbench.methods.plans import Tokens

UNLABELLED = -100
"""Label of a token that no loss is computed on."""
TokenContext = Callable[[], Tokens | None]
"""Says what is known of the tokens of the call that is under way; None where nothing is."""


def nothing_known() -> Tokens | None:
    """The context of linears outside the language model."""
    return None


class CallTokens:
    """What is known of the tokens in the call under way. Calling it gives those of the layer that runs now.

    A call brings the whole prompt, and every layer holds all of it unless tokens are dropped between layers. Whoever
    drops them says so with `narrow`.

    Args:
        image_token: id of the placeholder token.
    """

    def __init__(self, image_token: int) -> None:
        self.image_token = image_token
        self._whole: Tokens | None = None
        self._held: Tokens | None = None

    def __call__(self) -> Tokens | None:
        return self._held

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """A call with these keyword arguments begins."""
        self._whole = self._held = tokens_of(inputs, self.image_token)

    def end(self) -> None:
        """The call is over, also if it failed."""
        self._whole = self._held = None

    def narrow(self, columns: Tensor, valid: Tensor) -> None:
        """From here on, layers hold only some of the call's tokens.

        Args:
            columns: [B, S] columns of the call that they hold.
            valid: [B, S] bool, False where a row is padded.
        """
        self._held = self._at(columns, valid)

    @contextlib.contextmanager
    def only(self, row: int, columns: Tensor) -> Iterator[None]:
        """While the context is open, linears are called with a few tokens of a single row.

        Args:
            row: row of the batch.
            columns: [S] columns of the call, none of which is padding.
        """
        held = self._held
        self._held = self._at(columns.unsqueeze(0), torch.ones_like(columns, dtype=torch.bool).unsqueeze(0), row)
        try:
            yield
        finally:
            self._held = held

    def _at(self, columns: Tensor, valid: Tensor, row: int | None = None) -> Tokens | None:
        """The call's tokens at some columns, of all rows or of one."""
        if self._whole is None:
            return None
        vision = self._whole.vision if row is None else self._whole.vision[row : row + 1]
        columns, valid = columns.to(vision.device), valid.to(vision.device)
        return Tokens(vision.gather(1, columns) & valid, valid, self._whole.prefill)


_watched: WeakKeyDictionary[nn.Module, CallTokens] = WeakKeyDictionary()


@contextlib.contextmanager
def watching(core: nn.Module, image_token: int) -> Iterator[CallTokens]:
    """Watch `core`, the module that takes `input_ids`, and yield what says which tokens its present layer holds.

    Nested contexts share one watch.
    """
    if core in _watched:
        yield _watched[core]
        return
    tokens, signature = CallTokens(image_token), inspect.signature(core.forward)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # Some models pass their input_ids by position.
        tokens.begin({**dict(zip(signature.parameters, args, strict=False)), **kwargs})

    handles = [
        core.register_forward_pre_hook(enter, with_kwargs=True),
        core.register_forward_hook(lambda module, args, output: tokens.end(), always_call=True),
    ]
    _watched[core] = tokens
    try:
        yield tokens
    finally:
        del _watched[core]
        for handle in handles:
            handle.remove()


def watch_of(core: nn.Module) -> CallTokens | None:
    """The watch that is open on this module; None if no quantizer asks which tokens a layer holds."""
    return _watched.get(core)


def tokens_of(inputs: Mapping[str, Any], image_token: int) -> Tokens | None:
    """Which tokens a call holds, from its keyword arguments; None where there are no `input_ids`."""
    ids = inputs.get("input_ids")
    if ids is None:
        return None
    past = inputs.get("past_key_values")
    before = 0 if past is None else int(past.get_seq_length())
    valid = _valid(inputs.get("attention_mask"), ids, before)
    return Tokens(ids == image_token, valid.to(ids.device), prefill=not before)


def _valid(mask: Any, ids: Tensor, before: int) -> Tensor:
    """[B, L] bool: which of the present tokens are no padding.

    Args:
        mask: [B, K], which says it; or [B or 1, heads, L, K], True or 0 where a query attends to a key, as `generate`
            makes it for a static cache, whose K is larger than what it holds; or several of these, by kind of layer.
            A token is no padding if any query attends to it.
        ids: [B, L] present tokens.
        before: number of tokens in the cache.
    """
    masks = [one for one in (mask.values() if isinstance(mask, Mapping) else [mask]) if isinstance(one, Tensor)]
    valid = torch.ones_like(ids, dtype=torch.bool)
    for one in masks[:1]:  # kinds of layers differ in how far they look, not in what is padding
        if one.ndim == 4:
            one = (one if one.dtype == torch.bool else one == 0).any(dim=(1, 2)).expand(len(ids), -1)
        start = before if one.shape[1] >= before + ids.shape[1] else one.shape[1] - ids.shape[1]
        valid = one[:, start : start + ids.shape[1]].bool()
    return valid
