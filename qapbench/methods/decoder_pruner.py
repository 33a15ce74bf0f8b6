"""The base class of pruners that drop tokens between layers of the language model."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

from .pruner import Pruner


class Stage(NamedTuple):
    """One drop inside the decoder.

    Attributes:
        after: number of decoder layers before the drop.
        keep: tokens per image that the drop leaves.
    """

    after: int
    keep: int


class DecoderPruner(Pruner):
    """A method that drops visual tokens between layers of the language model. The first layers see all tokens.

    `select` is called at every stage with the tokens that are left. Their `projected` field holds their hidden states
    at that stage, on which sensitivity is computed; the other fields that `needs` can name are DECODER_FIELDS. The
    layers after a stage see the tokens chosen there, at their original positions. A method that shortens the prompt
    too names in `front` who does, and in `entering` to how many tokens.

    Attributes:
        ahead: whether attention and keys are read in the layer that follows the drop rather than in the one before it.
        counts: what `keep` counts: the tokens that layers after the last drop receive ("last"), or the mean over all
            layers ("mean"), for a method that leaves none in the end.
        DECODER_FIELDS: fields of `VisionTokens` that only the decoder can fill.
        TEXT_FIELDS: those of them that hold something of the prompt's text.
    """

    DECODER_FIELDS: ClassVar[frozenset[str]] = frozenset(
        {
            "query_attention",
            "text_attention",
            "context_attention",
            "rotated_keys",
            "final_states",
            "prompt_embeds",
            "text_keys",
            "text_states",
            "embedded",
        }
    )
    TEXT_FIELDS: ClassVar[frozenset[str]] = frozenset(
        {"query_attention", "text_attention", "prompt_embeds", "text_keys", "text_states"}
    )
    ahead: ClassVar[bool] = False
    counts: ClassVar[Literal["last", "mean"]] = "last"

    @property
    def front(self) -> Pruner | None:
        """The method that shortens the prompt before it enters the decoder; None leaves it whole."""
        return None

    def entering(self, count: int, keep: int) -> int:
        """Number of a view's tokens that enter the decoder; see `Pruner.entering`. They are all, without a `front`."""
        return count

    @abc.abstractmethod
    def stages(self, count: int, keep: int, depth: int) -> list[Stage]:
        """The drops in the order of the layers. The last one keeps `keep` tokens, unless `counts` is "mean".

        Args:
            count: visual tokens per image that enter the decoder.
            keep: tokens per image, counted as `counts` says.
            depth: number of decoder layers, at least two. Every drop comes after 1 to depth - 1 of them.
        """


def even_stages(layers: Sequence[float], count: int, keep: int, depth: int) -> list[Stage]:
    """Make stages that each keep the same fraction of the tokens which the stage before left.

    Stage s of S keeps round(count * (keep / count)^(s / S)) tokens.

    Args:
        layers: number of layers before each stage, rounded and limited to 1 .. depth - 1. If two stages of a shallow
            decoder fall on the same place, the later one counts.
        count: visual tokens per image before the first stage.
        keep: tokens per image after the last stage.
        depth: number of decoder layers.
    """
    places = [min(max(round(layer), 1), depth - 1) for layer in layers]
    budgets = [round(count * (keep / count) ** (step / len(places))) for step in range(1, len(places) + 1)]
    return [Stage(*stage) for stage in dict(zip(places, budgets, strict=True)).items()]
