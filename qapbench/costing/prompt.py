"""The prompt whose cost is counted."""

from __future__ import annotations

from dataclasses import dataclass

from qapbench.errors import UserError

LIMIT = 1 << 20  # tokens or prompts beyond which a number is a mistake


@dataclass(frozen=True)
class Prompt:
    """A prompt with images, as far as its cost depends on it.

    Attributes:
        before: text tokens in front of the images. LLaVA-1.5's system prompt has 35.
        after: text tokens behind the images, up to the answer.
        images: height and width in pixels of each image.
        new_tokens: tokens that are generated. The cost of a decoded token is the mean over them.
        batch: equal prompts that are answered side by side.

    Raises:
        UserError: a number is out of range.
    """

    before: int = 35
    after: int = 29
    images: tuple[tuple[int, int], ...] = ((672, 672),)
    new_tokens: int = 1
    batch: int = 1

    def __post_init__(self) -> None:
        for name, least in (("before", 0), ("after", 1), ("new_tokens", 1), ("batch", 1)):
            if not least <= getattr(self, name) <= LIMIT:
                raise UserError(f"prompt.{name}: {getattr(self, name)} is not between {least} and {LIMIT}")
        for size in self.images:
            if len(size) != 2 or not all(1 <= side <= LIMIT for side in size):
                raise UserError(f"prompt.images: {size} is no height and width in pixels")

    @property
    def text(self) -> int:
        """Number of text tokens."""
        return self.before + self.after
