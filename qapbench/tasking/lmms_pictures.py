"""Pictures of lmms-eval's documents, decoded when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from qapbench.errors import Problem, UserError

from .images import Decoded, as_rgb, digest_image
from .lmms_index import NAME


@dataclass(frozen=True)
class Picture:
    """A picture of a document, which is decoded again when it is needed.

    Attributes:
        pictures: finds it.
        doc: number of the document.
        index: number of the picture in the document.
        content: hash of its pixels.
    """

    pictures: Pictures
    doc: int
    index: int
    content: str

    def digest(self) -> str:
        """Hash of the picture's content."""
        return self.content

    def decode(self, background: str | None = None) -> Decoded:
        """The picture in RGB; see `qapbench.tasking.images.decode`."""
        return as_rgb(self.pictures.opened(self.doc)[self.index], background)


class Pictures:
    """The pictures of a task's documents. Those of one document stay open; of all others only hashes are kept.

    Args:
        task: name of the task.
        visuals: lmms-eval's `doc_to_visual`, by the number of a document.
    """

    def __init__(self, task: str, visuals: Callable[[int], Any]) -> None:
        self.task = task
        self.visuals = visuals
        self._known: dict[int, list[Picture]] = {}
        self._latest: tuple[int, list[Image.Image]] = (-1, [])

    def of(self, doc: int) -> list[Picture]:
        """The pictures of a document.

        Args:
            doc: number of the document.

        Raises:
            UserError: the document has something else, such as a video.
        """
        if doc not in self._known:
            contents = [digest_image(image) for image in self.opened(doc)]
            self._known[doc] = [Picture(self, doc, index, content) for index, content in enumerate(contents)]
        return self._known[doc]

    def opened(self, doc: int) -> list[Image.Image]:
        """The pictures of a document, as the task gives them.

        Args:
            doc: number of the document.

        Raises:
            UserError: the document has something else, such as a video.
        """
        if self._latest[0] != doc:
            found = self.visuals(doc) or []
            for visual in found:
                if not isinstance(visual, Image.Image):
                    kind = type(visual).__name__
                    message = f"'{self.task}' asks about more than pictures (document {doc} has a {kind})"
                    raise UserError(Problem(message, NAME))
            self._latest = doc, list(found)
        return self._latest[1]
