"""SmolVLM2, for images: built like Idefics3."""

from __future__ import annotations

from typing import Any

from qapbench.models.family import family

from .idefics3 import Idefics3


@family("smolvlm")
class SmolVLM(Idefics3):
    """See `Idefics3`.

    The processor is loaded as that of Idefics3, which writes the same prompts and pixels for images; SmolVLM's own asks
    for a video processor and for num2words, which only videos need.
    """

    @classmethod
    def tiny(cls) -> tuple[Any, dict[str, Any]]:
        """A random vision tower and Llama, and one prompt with an image of two tiles and itself scaled down."""
        from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

        return cls.made(SmolVLMConfig, SmolVLMForConditionalGeneration)
