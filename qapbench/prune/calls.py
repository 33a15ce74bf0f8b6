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

from .pruning import Pruning

VIDEO = "pixel_values_videos"


class PrunedCalls:
    """Wraps a model's two entry points with one pruning.

    Args:
        pruning: the pruning.
    """

    def __init__(self, pruning: Pruning) -> None:
        self.pruning = pruning
        self.family = pruning.family

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
            if not self._has_images(kwargs):
                return forward(**kwargs)
            with self.pruning.shortened(kwargs, relevance_text) as short:
                return forward(**short)

        return pruned

    def _wrap_generate(self, generate: Any) -> Any:
        @functools.wraps(generate)
        def pruned(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            relevance_text = kwargs.pop("relevance_text", None)
            if inputs is not None:
                kwargs["input_ids"] = inputs
            if not self._has_images(kwargs):
                return generate(None, *args, **kwargs)
            prompt = kwargs["input_ids"]
            with self.pruning.shortened(kwargs, relevance_text) as short:
                removed = prompt.shape[1] - short["input_ids"].shape[1]
                if short.get("max_length") is not None:  # it counts the prompt, which is shorter now
                    short["max_length"] -= removed
                output = generate(None, *args, **short)
            return _with_prompt(output, prompt, short["input_ids"].shape[1])

        return pruned

    def _has_images(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call brings images.

        Raises:
            UserError: it brings videos.
        """
        if kwargs.get(VIDEO) is not None:
            raise UserError(f"{VIDEO}: videos cannot be pruned, only images")
        return kwargs.get(self.family.image_inputs[0]) is not None


def _with_prompt(output: Any, prompt: Tensor, cut: int) -> Any:
    """The output of `generate` with the caller's own prompt in front of the new tokens.

    Args:
        output: sequences, or an output object that holds them.
        prompt: [B, L] ids of the caller's prompt.
        cut: length of the shortened prompt.
    """
    sequences = output if isinstance(output, Tensor) else output.sequences
    repeats = sequences.shape[0] // prompt.shape[0]
    whole = torch.cat([prompt.repeat_interleave(repeats, dim=0), sequences[:, cut:]], dim=1)
    if isinstance(output, Tensor):
        return whole
    output.sequences = whole
    return output
