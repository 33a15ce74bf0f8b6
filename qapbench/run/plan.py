"""What is to be done, before a model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qapbench.spec import RunSpec

from .tasks import LoadedTask

TEXT_DEPENDS_ON = ("model", "data", "precision", "ptq", "calibration")  # the kinds of fingerprint


@dataclass(frozen=True)
class Planned:
    """One run before it is made.

    Attributes:
        id: hash of how it compresses and asks, and of the content that it reads.
        text_key: hash of what a text-only answer depends on: everything but the pruner.
        group: hash of the model as quantized, whatever is asked of it and however it is pruned.
        total: questions to answer; answered: those that are.
        done: whether its record is written.
        stopped: whether that record ends with a part of the questions (`--fast`).
    """

    spec: RunSpec
    id: str
    text_key: str
    group: str
    folder: Path
    total: int
    answered: int
    done: bool
    stopped: bool = False
    fingerprints: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def state(self) -> Literal["done", "stopped", "begun", "new"]:
        return "stopped" if self.stopped else "done" if self.done else "begun" if self.answered else "new"


@dataclass(frozen=True)
class Shared:
    """How much of a sweep's missing work is done once.

    Attributes:
        cells: runs that are not finished; groups: quantizers among them, models as quantized.
        asked: answers that are missing; text: those to questions without an image.
        computed: forward passes left once text is answered once a group, before equal selections are known.
        images: different images, of `shown` that the missing answers look at.
        looks: ways of pruning (dense among them).
    """

    cells: int
    groups: int
    asked: int
    text: int
    computed: int
    shown: int
    images: int
    looks: int

    @property
    def lines(self) -> list[str]:
        """In words, for a terminal."""
        if not self.asked:
            return []
        return [
            f"{self.cells} run(s) on {self.groups} model(s) as quantized: {self.asked} answers are missing",
            f"{self.text} of them without an image: answered once a quantizer, {self.asked - self.computed} shared",
            f"{self.shown} with an image: the tower runs {self.images} time(s), once an image; {self.looks} way(s) to "
            "choose tokens, and equal choices share an answer",
        ]


def group_key(spec: RunSpec, about_text: dict[str, str]) -> str:
    """Hash of the model as quantized."""
    quantize = spec.quantize.model_dump(mode="json") if spec.quantize else None
    content: list[Any] = [quantize, spec.seed, about_text]
    if quantize and (quantize.get("calibration") or {}).get("pruned"):  # calibrated as pruned: no other run shares it
        content.append(look_of(spec))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def look_of(spec: RunSpec) -> str | None:
    """Hash of how a run prunes: equal looks choose equal tokens of equal images. None where it does not."""
    if spec.prune is None:
        return None
    content = [spec.prune.model_dump(mode="json"), spec.text_tower]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def about_text(fingerprints: dict[str, str]) -> dict[str, str]:
    """The fingerprints that a text-only answer depends on."""
    return {key: value for key, value in fingerprints.items() if key.split()[0] in TEXT_DEPENDS_ON}


def shared_work(plans: Sequence[Planned], tasks: Iterable[LoadedTask], missing: dict[str, set[int]]) -> Shared:
    """Count what is shared.

    Args:
        tasks: of each plan.
        missing: by run id, the documents without an answer.
    """
    text: dict[tuple[str, str, int], int] = {}
    shown, pictures = 0, set[str]()
    unfinished = [plan for plan in plans if missing.get(plan.id)]
    for plan, task in zip(plans, tasks, strict=True):
        for doc in missing.get(plan.id, ()):
            image = _image(task, doc)
            if image is None:
                place = (plan.group, task.name, doc)
                text[place] = text.get(place, 0) + 1
            else:
                shown += 1
                pictures.add(image)
    asked = sum(len(missing.get(plan.id, ())) for plan in plans)
    repeated = sum(text.values()) - len(text)
    return Shared(
        len(unfinished), len({plan.group for plan in unfinished}), asked, sum(text.values()), asked - repeated, shown,
        len(pictures), len({look_of(plan.spec) for plan in unfinished}),
    )  # fmt: skip


def _image(task: LoadedTask, doc: int) -> str | None:
    """A content hash of a document's images; None where it has none."""
    from .questions import digest

    images = task.task.doc_to_image(task.docs[doc]) if getattr(task.task, "MULTIMODAL", False) else None
    if not images:
        return None
    return " ".join(map(digest, images if isinstance(images, list) else [images]))
