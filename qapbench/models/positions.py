"""How many positions a decoder was made for, and how many a prompt needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STRETCHED = frozenset({"linear", "dynamic", "yarn"})
"""Kinds of RoPE scaling whose factor is not in `max_position_embeddings` yet."""


def positions_of(model: Any) -> int | None:
    """Number of positions that the decoder of a model was made for; None if its config does not say.

    It is `max_position_embeddings`, times the factor by which RoPE is stretched, counted from
    `original_max_position_embeddings` where the config has it.
    """
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(most, int) or not isinstance(rope, Mapping) or rope.get("rope_type") not in STRETCHED:
        return most if isinstance(most, int) else None
    original = rope.get("original_max_position_embeddings") or most
    return max(most, round(original * float(rope.get("factor") or 1)))


def positions_needed(inputs: Mapping[str, Any]) -> int:
    """Number of positions that a prompt of one row needs: its largest position id, and one.

    Of M-RoPE, whose ids have several axes, it is the largest of any axis: an image of many tokens needs few positions.
    Without position ids the model counts the tokens.

    Args:
        inputs: keyword arguments of the decoder, `position_ids` [..., 1, T] among them if it does not count by itself.
    """
    if (given := inputs.get("position_ids")) is not None:
        return int(given.max()) + 1
    return int(inputs["input_ids"].shape[1])
