"""What is to be done, decided before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qapbench.hashing import digest_json
from qapbench.spec.run_spec import RunSpec
from qapbench.tasking.images import digest_image
from qapbench.tasking.outline import TaskOutline

from .fingerprints import OF_PRUNING, OF_TEXT, about

PruneKey = str | None
"""One way of pruning, by the content of its spec; None is every token."""


@dataclass(frozen=True)
class Planned:
    """One run before it is made.

    Attributes:
        id: hash of how it compresses and asks, and of the content that it reads.
        text_key: hash of what a text-only answer depends on: everything but the pruner, unless calibration prunes.
        group: hash of the model as quantized, whatever is asked of it and however it is pruned.
        task: what is asked.
        total: questions to answer; answered: those that are.
        done: whether its record is written.
        stopped: whether that record ends with a part of the questions (`--fast`).
    """

    spec: RunSpec
    id: str
    text_key: str
    group: str
    folder: Path
    task: TaskOutline = field(repr=False)
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
        runs: that are not finished; groups: models as quantized among them.
        asked: answers that are missing; text: those to questions without an image.
        computed: forward passes left once text is answered once per group, before equal selections are known.
        with_image: missing answers to questions with an image; images: different images among these.
        prunings: ways of pruning, dense among them.
    """

    runs: int
    groups: int
    asked: int
    text: int
    computed: int
    with_image: int
    images: int
    prunings: int

    @property
    def lines(self) -> list[str]:
        """The same in words, for a terminal."""
        if not self.asked:
            return []
        return [
            f"{self.runs} run(s) on {self.groups} model(s) as quantized: {self.asked} answers are missing",
            f"{self.text} of them without an image: answered once per quantizer, {self.asked - self.computed} shared",
            f"{self.with_image} with an image: the tower runs {self.images} time(s), once per image; {self.prunings} "
            "way(s) to choose tokens, and equal choices share an answer",
        ]


def group_key(spec: RunSpec, content: dict[str, str]) -> str:
    """Hash of the model as quantized; where calibration prunes, of the pruning too.

    Args:
        content: the run's fingerprints.
    """
    quantize = spec.quantize.model_dump(mode="json") if spec.quantize else None
    parts: list[Any] = [quantize, spec.seed, about(content, OF_TEXT)]
    if spec.quantize and spec.quantize.calibration and spec.quantize.calibration.pruned and spec.prune:
        parts += [spec.prune.model_dump(mode="json"), about(content, OF_PRUNING)]
    return digest_json(parts)


def prune_key(spec: RunSpec) -> PruneKey:
    """Hash of how a run prunes: equal keys choose equal tokens of equal images. None where it does not prune."""
    if spec.prune is None:
        return None
    return digest_json([spec.prune.model_dump(mode="json"), spec.text_tower])


def shared_work(plans: Sequence[Planned], missing: Mapping[str, set[int]]) -> Shared:
    """Count what runs share; reads the images of the data.

    Args:
        missing: by run id, the documents without an answer.
    """
    text: dict[tuple[str, str, int], int] = {}
    with_image, pictures = 0, set[str]()
    unfinished = [plan for plan in plans if missing.get(plan.id)]
    for plan in plans:
        for doc in missing.get(plan.id, ()):
            images = plan.task.images(doc)
            if images:
                with_image += 1
                pictures.add(" ".join(map(digest_image, images)))
            else:
                place = (plan.group, plan.task.name, doc)
                text[place] = text.get(place, 0) + 1
    asked = sum(len(missing.get(plan.id, ())) for plan in plans)
    return Shared(
        runs=len(unfinished),
        groups=len({plan.group for plan in unfinished}),
        asked=asked,
        text=sum(text.values()),
        computed=asked - sum(text.values()) + len(text),
        with_image=with_image,
        images=len(pictures),
        prunings=len({prune_key(plan.spec) for plan in unfinished}),
    )
