"""One call of a module for one sample, and what is known of its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qapbench.methods.plans import Tokens

HIDDEN = "hidden_states"
"""Keyword of a block's input, if it is not positional."""


@dataclass
class Pass:
    """One call of a module for one sample, with its tensors in host memory.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        tokens: what is known of the prompt's tokens; None outside the language model.
        all_vision: whether all tokens are visual if `tokens` says nothing about them; otherwise all are text.
        labelled: [B, L] bool, True for the tokens of the answer; None outside the language model, and for a sample
            without labels.
        added: [B, L, D] what the model adds to the hidden states between the module before it and this one (DeepStack);
            None if nothing.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tokens: Tokens | None = None
    all_vision: bool = False
    labelled: Tensor | None = None
    added: Tensor | None = None

    def fed(self, hidden: Tensor) -> Pass:
        """The same call with the output of the module before it as hidden states."""
        if self.added is not None:
            hidden = hidden + self.added
        if self.args:
            return replace(self, args=(hidden, *self.args[1:]))
        return replace(self, kwargs={**self.kwargs, HIDDEN: hidden})

    def answer(self, x: Tensor) -> Tensor:
        """Tell which tokens of an input x [..., in] belong to the answer.

        Returns:
            [T] bool, where T is the product of the leading dimensions of x. If the sample has no labels or they have
            another shape, all tokens count that are valid and not visual.
        """
        if self.labelled is not None and self.labelled.shape == x.shape[:-1]:
            return self.labelled.flatten().to(x.device)
        vision, valid = self.masks(x)
        return valid & ~vision

    def masks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tell which tokens of an input x [..., in] are visual and which are valid.

        Returns:
            (vision, valid), both [T] bool, where T is the product of the leading dimensions of x. If `tokens` is
            unknown or has another shape, all tokens are valid and `all_vision` decides whether all are visual.
        """
        shape = x.shape[:-1]
        if self.tokens is not None and self.tokens.vision.shape == shape:
            return self.tokens.vision.flatten().to(x.device), self.tokens.valid.flatten().to(x.device)
        every = torch.ones(shape, dtype=torch.bool, device=x.device).flatten()
        return (every if self.all_vision else ~every), every


def first(output: Any) -> Tensor:
    """The tensor that a module returned, or the first one of several."""
    if isinstance(output, Mapping):  # the output of a whole model
        return next(iter(output.values()))
    return output[0] if isinstance(output, tuple) else output
