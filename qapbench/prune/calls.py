"""Wraps a model's own `forward` and `generate`, so that they prune their prompts."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qapbench.errors import UserError

from .cutting import TYPES
from .generation import ShortenedPrompt, refuse
from .pruning import Pruning
from .turns import CACHES, CachedPrompt, cache_of, filled

VIDEO = "pixel_values_videos"
READY = {
    "inputs_embeds": "inputs_embeds, in which images cannot be told from text,",
    "mm_encoder_outputs": "ready features",
}
"""Arguments that may bring images in a form that pruning does not see -> how a message calls them."""


class PrunedCalls:
    """Wraps a model's two entry points with one pruning.

    Args:
        pruning: the pruning.
    """

    def __init__(self, pruning: Pruning) -> None:
        self.pruning = pruning
        self.family = pruning.family
        self._generating = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """While the context is open, the model's `forward` and `generate` are wrapped.

        The wrappers are attributes of the instance, so that removing them restores the methods of the class.
        """
        model = self.family.model
        held = {name: model.__dict__[name] for name in ("forward", "generate") if name in model.__dict__}
        model.forward = self._wrap_forward(model.forward)
        model.generate = self._wrap_generate(model.generate)
        try:
            with self.pruning.decoder.installed() if self.pruning.decoder else contextlib.nullcontext():
                yield
        finally:
            for name in ("forward", "generate"):
                if name in held:
                    setattr(model, name, held[name])
                else:
                    delattr(model, name)

    def _wrap_forward(self, forward: Any) -> Any:
        signature = inspect.signature(forward)

        @functools.wraps(forward)
        def pruned(*args: Any, relevance_text: list[str] | None = None, **kwargs: Any) -> Any:
            if args:
                kwargs = {**dict(zip(signature.parameters, args, strict=False)), **kwargs}
            if self._generating:  # the prompt is pruned already
                return forward(**kwargs)
            if not self._has_images(kwargs):
                return forward(**self._behind(kwargs))
            self._check_training()
            with self.pruning.shortened(kwargs, relevance_text) as short:
                columns = kwargs["input_ids"].shape[1]
                if isinstance(kwargs.get("logits_to_keep"), Tensor) and short["input_ids"].shape[1] != columns:
                    raise UserError("logits_to_keep: give a number, because the columns of a pruned prompt are others")
                output = forward(**short)
            self._remember(kwargs, short, cache_of(output))
            return output

        return pruned

    def _wrap_generate(self, generate: Any) -> Any:
        names = list(inspect.signature(generate).parameters)

        @functools.wraps(generate)
        def pruned(*args: Any, relevance_text: list[str] | None = None, **kwargs: Any) -> Any:
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
            if (inputs := kwargs.pop("inputs", None)) is not None:
                kwargs["input_ids"] = inputs
            with self._own_calls():
                if not self._has_images(kwargs):
                    return self._turn(generate, kwargs)
                refuse(self.family.model, kwargs)
                with self.pruning.shortened(kwargs, relevance_text) as short:
                    output = self._generated(generate, kwargs["input_ids"], short)
                given = kwargs.get("past_key_values")
                self._remember(kwargs, short, cache_of(output) if given is None else given)
                return output

        return pruned

    @contextlib.contextmanager
    def _own_calls(self) -> Iterator[None]:
        """While the context is open, `forward` is called by `generate` and left alone."""
        held, self._generating = self._generating, True
        try:
            yield
        finally:
            self._generating = held

    def _generated(self, generate: Any, ids: Tensor, short: dict[str, Any]) -> Any:
        """The output of `generate`, with the caller's own prompt in front of the new tokens.

        Args:
            generate: the model's own.
            ids: [B, L] ids of the caller's prompt.
            short: the keyword arguments with the shortened prompt.
        """
        prompt = ShortenedPrompt(ids, short["input_ids"].shape[1])
        output = generate(**prompt.arguments(self.family.model, short))
        if isinstance(output, Tensor):
            return prompt.whole(output)
        output.sequences = prompt.whole(output.sequences)
        return output

    def _turn(self, generate: Any, kwargs: dict[str, Any]) -> Any:
        """`generate` without images: of a text, or of a further turn on the cache of a pruned prompt."""
        cached, cache = self._cached(kwargs)
        if cached is None:
            return generate(**kwargs)
        refuse(self.family.model, kwargs)
        if cached.whole:
            return generate(**kwargs)
        return self._generated(generate, kwargs["input_ids"], cached.turn(cache, kwargs))

    def _behind(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `forward` without images: of a text, or of new tokens behind a pruned prompt."""
        cached, cache = self._cached(kwargs)
        return kwargs if cached is None or cached.whole else cached.following(cache, kwargs)

    def _cached(self, kwargs: dict[str, Any]) -> tuple[CachedPrompt | None, Any]:
        """(what is known of the pruned prompt in a call's KV cache, the cache); None if it holds no such prompt."""
        cache = kwargs.get("past_key_values")
        if cache is not None and not filled(cache):
            CACHES.pop(cache, None)  # it was emptied since, and holds what comes now
        cached = None if cache is None else CACHES.get(cache)
        if cached is not None:
            cached.check(cache, len(kwargs["input_ids"]), self.pruning.decoder)
        return cached, cache

    def _remember(self, kwargs: dict[str, Any], short: dict[str, Any], cache: Any) -> None:
        """Note what a KV cache holds of a prompt that was pruned.

        Args:
            kwargs: the caller's arguments.
            short: those with the shortened prompt.
            cache: the cache that the call filled; None if there is none.
        """
        if cache is None:
            return
        CACHES.pop(cache, None)
        ids, mask = short["input_ids"], short["attention_mask"]
        positions = short.get("position_ids")
        if positions is None and self.pruning.decoder is None:
            return  # nothing was removed
        if positions is None:
            positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        counted = positions.ndim == 2 and self.pruning.spec.positions != "keep"
        typed = {name: short[name] for name in TYPES if short.get(name) is not None}
        CACHES[cache] = CachedPrompt(kwargs["input_ids"], ids, mask, positions, typed, counted, self.pruning.decoder)

    def _check_training(self) -> None:
        """Refuse training of the vision tower or the projector, whose gradients end at the selection.

        Raises:
            UserError: one of their weights would be trained.
        """
        if not (self.family.model.training and torch.is_grad_enabled()):
            return
        roots = (root for name in ("vision", "projector") for root in self.family.roots(name))
        if any(weight.requires_grad for root in roots for weight in root.parameters()):
            raise UserError(
                "model: no gradient passes through pruning to the vision tower and the projector; freeze both with "
                "`requires_grad_(False)`, or call `model.eval()`"
            )

    def _has_images(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call brings images.

        Raises:
            UserError: it brings videos, or images in a form that cannot be pruned.
        """
        if kwargs.get(VIDEO) is not None:
            raise UserError(f"{VIDEO}: videos cannot be pruned, only images")
        for name in READY:
            if kwargs.get(name) is not None:
                raise UserError(
                    f"{name}: {READY[name]} cannot be pruned; give input_ids with image placeholders, and pixel_values"
                )
        return kwargs.get(self.family.image_inputs[0]) is not None
