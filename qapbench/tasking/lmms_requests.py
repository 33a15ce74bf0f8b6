"""What lmms-eval asks for, in the words of lm-eval."""

from __future__ import annotations

from typing import Any

from .lm import MARK

GENERATION = frozenset(
    {"until", "max_new_tokens", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "num_beams"}
    | {"repetition_penalty", "length_penalty"}
)
"""Options of generation that every model has. Tasks name others, such as `image_aspect_ratio`, for a particular one."""


def marked(text: str, pictures: int) -> str:
    """A text with a mark for each of its pictures, in front unless the text has them where they belong.

    Args:
        text: the text.
        pictures: number of pictures.
    """
    return text if text.count(MARK) == pictures else f"{MARK}\n" * pictures + text


def generation(options: dict[str, Any]) -> dict[str, Any]:
    """The options of generation that a task asks for, without those of particular models.

    As in lmms-eval's own models, a temperature above 0 asks for sampling, unless the task says otherwise.
    """
    kept = {name: options[name] for name in sorted(GENERATION) if options.get(name) is not None}
    return {**kept, "do_sample": bool(kept.get("do_sample", (kept.get("temperature") or 0) > 0))}
