"""Plans of runs, which are made before any model is loaded, and the work that they share."""

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
"""Hash of a pruning configuration; None keeps every token."""


@dataclass(frozen=True)
class Planned:
    """The plan of one run.

    Attributes:
        spec: the run.
        id: hash of how the run compresses and asks, and of the content that it reads.
        text_key: hash of what answers to questions without an image depend on: all of that except the pruner, unless
            calibration prunes.
        group: hash of the quantized model, whatever it is asked and however prompts are pruned.
        folder: folder of the run's results.
        total: number of questions to answer.
        answered: number of questions that are answered.
        done: whether the record of the complete run is written.
        stopped: whether a record is written that ends after a part of the questions (`--fast`).
        damaged: names of the files that are not as the record says. Such a run is neither done nor stopped.
        fingerprints: content hashes of what the run reads.
        fresh: whether every question is answered anew, also where another run has an answer of the same key.
        values: hash of what the quantized model computes: `group` without how it stores its weights.
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
    damaged: tuple[str, ...] = ()
    fingerprints: dict[str, str] = field(default_factory=dict, repr=False)
    fresh: bool = False
    values: str = ""

    @property
    def state(self) -> Literal["done", "stopped", "damaged", "begun", "new"]:
        """How far the run is."""
        if self.damaged:
            return "damaged"
        return "stopped" if self.stopped else "done" if self.done else "begun" if self.answered else "new"


@dataclass(frozen=True)
class Shared:
    """The missing work of a sweep, and how much of it is done only once.

    Attributes:
        runs: number of unfinished runs.
        groups: number of quantized models among them.
        asked: number of missing answers.
        text: how many of these are to questions without an image.
        computed: number of forward passes if each group answers a question without an image once. Equal selections,
            which save more, are not known yet.
        with_image: number of missing answers to questions with an image.
        images: number of different images in these questions.
        prunings: number of pruning configurations, where "not pruned" counts as one.
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
        """The numbers as sentences for a terminal; empty if nothing is missing."""
        if not self.asked:
            return []
        return [
            f"{self.runs} run(s) on {self.groups} model(s) as quantized: {self.asked} answers are missing",
            f"{self.text} of them without an image: answered once per quantizer, {self.asked - self.computed} shared",
            f"{self.with_image} with an image: the tower runs {self.images} time(s), once per image; {self.prunings} "
            "way(s) to choose tokens, and equal choices share an answer",
        ]


def group_key(spec: RunSpec, content: dict[str, str], stored: bool = True) -> str:
    """Hash of the quantized model. If calibration prunes, it includes the pruning.

    Args:
        spec: the run.
        content: the run's fingerprints.
        stored: whether it includes how weights are stored, which changes no value.
    """
    left_out: set[str] = set() if stored else {"storage"}
    quantize = spec.quantize.model_dump(mode="json", exclude=left_out) if spec.quantize else None
    parts: list[Any] = [quantize, spec.seed, about(content, OF_TEXT)]
    if spec.quantize and spec.quantize.calibration and spec.task.background:  # its samples are shown on it too
        parts.append(spec.task.background)
    if spec.quantize and spec.quantize.calibration and spec.quantize.calibration.pruned and spec.prune:
        parts += [spec.prune.model_dump(mode="json"), about(content, OF_PRUNING)]
    return digest_json(parts)


def prune_key(spec: RunSpec) -> PruneKey:
    """Hash of how a run prunes; None if it does not. Equal keys select equal tokens of equal images."""
    if spec.prune is None:
        return None
    return digest_json([spec.prune.model_dump(mode="json"), spec.text_tower])


def shared_work(plans: Sequence[Planned], tasks: Sequence[TaskOutline], missing: Mapping[str, set[int]]) -> Shared:
    """Count the missing work that runs share. This reads the images of the data.

    Args:
        plans: the runs.
        missing: run id -> documents without an answer.
    """
    text: dict[tuple[str, str, int], int] = {}
    with_image, pictures = 0, set[str]()
    unfinished = [plan for plan in plans if missing.get(plan.id)]
    for plan, task in zip(plans, tasks, strict=True):
        for doc in missing.get(plan.id, ()):
            images = task.images(doc)
            if images:
                with_image += 1
                pictures.add(" ".join(map(digest_image, images)))
            else:
                place = (plan.group, task.name, doc)
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
