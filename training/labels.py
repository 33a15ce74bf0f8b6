"""Labels of patches, which a vision tower can be trained to predict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from qapbench.tasks.diagramqa.generate import sample
from qapbench.tasks.diagramqa.scene import Box, Scene

from .model import GRID, N_PATCHES, PATCH, PATCHES_SEEN

Slots = dict[str, list[str]]
"""The possible values of each slot. The first value of "name" is "", for the background."""


def covered(boxes: Sequence[Box]) -> Tensor:
    """Compute how much of each patch is covered by any of the boxes: [N], from 0 to 1."""
    mask = torch.zeros(GRID * PATCH, GRID * PATCH)
    for x0, y0, x1, y1 in boxes:
        mask[max(0, y0) : y1, max(0, x0) : x1] = 1
    return mask.view(GRID, PATCH, GRID, PATCH).mean((1, 3)).flatten()


def find_slots(seed: int, count: int = 6000) -> Slots:
    """Collect all slots and their values from the first `count` training scenes with an image."""
    found: dict[str, Counter[str]] = {"name": Counter()}
    for i in range(count):
        for thing in sample(seed, i, "train", modality="image").things:
            found["name"][thing.name] += 1
            for slot, value in thing.about.items():
                found.setdefault(slot, Counter())[value] += 1
    return {slot: ([""] if slot == "name" else []) + sorted(values) for slot, values in found.items()}


RELATIONS = ("across", "down", "eater", "eaten")
"""Slots whose value is another thing in the same image. To predict it, a patch has to attend to that thing."""


class Labeller:
    """Turns scenes into labels of patches.

    Attributes:
        slots: the possible values of each slot.
        places: index of each slot.
        values: for each slot, the index of each value.
        sizes: number of values of each slot.
    """

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.places = {slot: i for i, slot in enumerate(slots)}
        self.values = {slot: {value: i for i, value in enumerate(values)} for slot, values in slots.items()}
        self.sizes = [len(values) for values in slots.values()]

    def patches(self, scene: Scene) -> Tensor:
        """Label the patches of a scene: [N, slots] index of the value, or -1 if the slot has none.

        If several things cover a patch, the label is that of the smallest.
        """
        out = torch.full((N_PATCHES, len(self.slots)), -1)
        out[:, self.places["name"]] = 0
        for thing in sorted(scene.things, key=lambda t: -(t.box[2] - t.box[0]) * (t.box[3] - t.box[1])):
            inside = covered([thing.box]) > PATCHES_SEEN
            for slot, value in {"name": thing.name, **thing.about}.items():
                index = self.values.get(slot, {}).get(value)
                if index is not None:
                    out[inside, self.places[slot]] = index
        return out

    def all_patches(self, scenes: Sequence[Scene]) -> Tensor:
        """Label the patches of several scenes: [B, N, slots]."""
        return torch.stack([self.patches(scene) for scene in scenes])

    def relations(self, scene: Scene) -> list[tuple[int, Tensor, Tensor]]:
        """Collect which things of a scene are related.

        Returns:
            For each relation of each thing: its index in RELATIONS, [N] bool patches of the thing, and [N] bool patches
            of the related thing.
        """
        found = []
        for thing in scene.things:
            for index, relation in enumerate(RELATIONS):
                value = thing.about.get(relation)
                others = [t.box for t in scene.things if value and value in (t.name, t.about.get("label"))]
                if others and thing.name != "arrow":
                    found.append((index, covered([thing.box]) > PATCHES_SEEN, covered(others) > PATCHES_SEEN))
        return found
