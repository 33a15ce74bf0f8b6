"""Arguments of `generate` that count or read the prompt, adapted to a prompt that pruning has shortened."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qapbench.errors import UserError

COUNTING = (
    "max_length",
    "min_length",
    "prompt_length_to_skip",
    "begin_index",
    "regulation_start",
    "prompt_ignore_length",
)
"""Attributes of transformers' own criteria and processors that count the prompt's tokens."""
REFUSED = {
    "assistant_model": "the assistant would read the shortened prompt",
    "assistant_early_exit": "the early layers would take the prompt for their own",
    "use_mtp": "the drafting layers would read the shortened prompt",
    "token_healing": "it changes the prompt behind pruning",
}
"""Options of generation that cannot be combined with pruning, and why."""


@dataclass(frozen=True)
class ShortenedPrompt:
    """A prompt before and after pruning.

    Attributes:
        ids: [B, L] token ids of the caller's prompt.
        length: S, its length after pruning.
    """

    ids: Tensor
    length: int

    @property
    def removed(self) -> int:
        """Number of columns that pruning removed."""
        return self.ids.shape[1] - self.length

    def whole(self, sequences: Tensor) -> Tensor:
        """Sequences [B * times, S + new] with the caller's prompt in place of the shortened one."""
        times = sequences.shape[0] // self.ids.shape[0]
        prompt = self.ids.to(sequences.device).repeat_interleave(times, dim=0)
        return torch.cat([prompt, sequences[:, self.length :]], dim=1)

    def arguments(self, model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of `generate` under which it makes as many tokens as it would without pruning.

        Lengths that count the prompt are lowered by what was removed, and what reads the sequence sees it whole.

        Args:
            model: the model, whose own generation config holds the defaults.
            kwargs: the caller's keyword arguments.

        Raises:
            UserError: `max_length` leaves no room behind the caller's prompt.
        """
        kwargs = dict(kwargs)
        self._limit(model, kwargs, "max_length", "max_new_tokens")
        self._limit(model, kwargs, "min_length", "min_new_tokens")
        for name in ("stopping_criteria", "logits_processor"):
            if kwargs.get(name):
                kwargs[name] = type(kwargs[name])(self._adapted(one) for one in kwargs[name])
        if (allowed := kwargs.get("prefix_allowed_tokens_fn")) is not None:
            kwargs["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
                row, torch.cat([self.ids[row].to(ids.device), ids[self.length :]])
            )
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = WholeStreamer(kwargs["streamer"], self)
        return kwargs

    def _limit(self, model: Any, kwargs: dict[str, Any], name: str, by_new: str) -> None:
        """Lower one limit on the length where it applies: the argument, or a copy of the generation config."""
        limit = limit_on_length(model, kwargs, name, by_new)
        if limit is not None and name == "max_length" and limit <= self.ids.shape[1]:
            raise UserError(
                f"max_length: {limit} leaves no room behind a prompt of {self.ids.shape[1]} tokens; give max_new_tokens"
            )
        if limit is None:
            return
        lowered = max(limit - self.removed, 0)
        if kwargs.get(name) is None and kwargs.get("generation_config") is not None:
            kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
            setattr(kwargs["generation_config"], name, lowered)
        else:
            kwargs[name] = lowered

    def _adapted(self, one: Any) -> Any:
        """A criterion or a processor that judges as it would without pruning.

        Those of transformers keep their type, by which `generate` tells them from its defaults.
        """
        if not type(one).__module__.startswith("transformers."):
            return Whole(one, self)
        counts = {name: value for name in COUNTING if isinstance(value := getattr(one, name, None), int)}
        if not counts:
            return one
        adapted = copy.copy(one)
        for name, value in counts.items():
            setattr(adapted, name, max(value - self.removed, 0))
        return adapted


@dataclass(eq=False)
class Whole:
    """A stopping criterion or a logits processor of the caller's that sees the sequences with the caller's prompt.

    Attributes:
        inner: it.
        prompt: the prompt.
    """

    inner: Any
    prompt: ShortenedPrompt

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        return self.inner(self.prompt.whole(input_ids), scores)


@dataclass(eq=False)
class WholeStreamer:
    """A streamer of the caller's that gets the caller's prompt first, and then every new token.

    Attributes:
        inner: it.
        prompt: the prompt.
        started: whether the prompt was handed on.
    """

    inner: Any
    prompt: ShortenedPrompt
    started: bool = False

    def put(self, value: Tensor) -> None:
        """Hand on what `generate` writes."""
        self.inner.put(value if self.started else self.prompt.whole(value))
        self.started = True

    def end(self) -> None:
        """Hand on the end."""
        self.inner.end()


def option(model: Any, kwargs: dict[str, Any], name: str) -> Any:
    """An option as `generate` takes it: the argument, or that of the generation config, or of the model's own."""
    configs = (kwargs.get("generation_config"), model.generation_config)
    for value in (kwargs.get(name), *(getattr(config, name, None) for config in configs)):
        if value is not None:
            return value
    return None


def limit_on_length(model: Any, kwargs: dict[str, Any], name: str, by_new: str) -> int | None:
    """A limit that counts the prompt's tokens; None if there is none, or one that counts new tokens overrides it.

    Args:
        model: the model, whose own generation config holds the defaults.
        kwargs: the keyword arguments of `generate`.
        name: "max_length" or "min_length".
        by_new: the option that overrides it, "max_new_tokens" or "min_new_tokens".
    """
    return None if option(model, kwargs, by_new) is not None else option(model, kwargs, name)


def refuse(model: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what cannot be combined with pruning.

    Raises:
        UserError: an option of REFUSED is set.
    """
    for name, why in REFUSED.items():
        if option(model, kwargs, name):
            raise UserError(f"{name}: cannot be combined with pruning, because {why}")
