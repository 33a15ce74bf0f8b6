"""What the language model gets of each question: images seen once, tokens chosen once, for all runs that need them."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from qapbench.models import Family
from qapbench.models.views import Seen
from qapbench.prune import PrunedCalls
from qapbench.shown import Memo, Shown, whole

from .questions import Question, decoded

Look = str | None
"""One way of pruning, by the content of its spec; None is every token."""
Stage = Callable[[str], contextlib.AbstractContextManager[Any]]


class Sight:
    """Sees and chooses for every way of pruning that shares a vision side.

    The images of the latest question stay in memory, and nothing else, so questions on one image should follow each
    other. What later quantizer groups will ask for goes into the cabinet.

    Args:
        calls: the pruning of each look.
        stage: times what is done under a name.
    """

    def __init__(self, family: Family, processor: Any, calls: dict[str, PrunedCalls], stage: Stage) -> None:
        self.family = family
        self.processor = processor
        self.calls = calls
        self.stage = stage
        self.needs = frozenset[str]().union(*(one.needs for one in calls.values()))
        self._latest: tuple[tuple[str, ...], Seen, dict[Any, Any]] | None = None

    @torch.inference_mode()
    def show(self, question: Question, prompt: str, looks: Iterable[Look]) -> dict[Look, Shown]:
        """The question under each look; under every look the same where it has no image."""
        with self.stage("prompt"):
            inputs = self._inputs(question, prompt)
        if not question.images:
            return dict.fromkeys(looks, Shown(inputs, [], []))
        if self._latest is None or self._latest[0] != question.pictures:
            with self.stage("vision"):
                self._latest = None
                self._latest = question.pictures, self.family.look(inputs, self.needs), {}
        _, seen, of_image = self._latest
        memo = Memo(image=of_image)
        texts = [question.relevance_text] * len(question.images)
        with self.stage("choose"):
            return {look: self._under(look, inputs, seen, texts, memo) for look in looks}

    def _under(self, look: Look, inputs: dict[str, Any], seen: Seen, texts: list[str], memo: Memo) -> Shown:
        dense = whole(inputs, seen, self.family)
        if look is None:
            return dense
        shown = self.calls[look].show(inputs, seen, texts, memo)
        if shown.inside is not None:
            return shown
        same = len(shown.features) == len(dense.features) and all(map(torch.equal, shown.features, dense.features))
        # Equal to the dense prompt in every key, so that its answer is taken.
        return Shown(dense.inputs, dense.features, shown.images) if same else shown

    def _inputs(self, question: Question, prompt: str) -> dict[str, Any]:
        if not question.images:
            # Without an image to stand for, the placeholder's spelling is the question's own text.
            mark = self.processor.image_token
            prompt = prompt.replace(mark, f"< {mark[1:]}")
        images = [decoded(image) for image in question.images]
        # As the images of one prompt: OneVision cuts tiles of an image that is alone, and of no others.
        inputs = self.processor(text=[prompt], images=[images] if images else None, return_tensors="pt")
        found = {key: value.to(self.family.model.device) for key, value in inputs.items()}
        return {"attention_mask": torch.ones_like(found["input_ids"]), **found}


class Cabinet:
    """Shown prompts that wait for a later quantizer group: in memory up to a limit, or in a memory-mapped file.

    Args:
        limit: bytes in memory; what does not fit is not kept, and will be seen again.
        spill: folder for a file that holds everything instead; it vanishes with the process.
    """

    def __init__(self, limit: int, spill: Path | None = None) -> None:
        self.limit = limit
        self.used = 0
        self._held: dict[Any, bytes] = {}
        self._places: dict[Any, tuple[int, int]] = {}
        self._file: Any = None
        if spill is not None:
            spill.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=spill, prefix="features-")  # noqa: SIM115
            self._end = 0

    def put(self, name: Any, shown: dict[Look, Shown]) -> None:
        data = _packed(shown)
        if self._file is not None:
            self._places[name] = self._end, len(data)
            os.pwrite(self._file.fileno(), data, self._end)
            grain = mmap.ALLOCATIONGRANULARITY  # where a mapping may begin
            self._end += -(-len(data) // grain) * grain
        elif self.used + len(data) <= self.limit:
            self._held[name] = data
            self.used += len(data)

    def get(self, name: Any, device: torch.device) -> dict[Look, Shown]:
        """What was put there; empty where nothing is."""
        if name in self._places:
            start, size = self._places[name]
            with mmap.mmap(self._file.fileno(), size, offset=start, access=mmap.ACCESS_READ) as view:
                return _unpacked(view[:], device)
        return _unpacked(self._held[name], device) if name in self._held else {}

    def drop(self, name: Any) -> None:
        """No group will ask for it any more."""
        self._places.pop(name, None)
        self.used -= len(self._held.pop(name, b""))


def _packed(shown: dict[Look, Shown]) -> bytes:
    """As safetensors: what a later process or group reads back is the same to the bit."""
    tensors: dict[str, Tensor] = {}
    said: list[Any] = []
    for at, (look, one) in enumerate(shown.items()):
        said.append([look, one.images])
        tensors |= {f"{at}/input/{name}": value.clone().contiguous() for name, value in one.inputs.items()}
        tensors |= {f"{at}/feature/{i:04}": value.clone().contiguous() for i, value in enumerate(one.features)}
    return safetensors.torch.save({name: value.cpu() for name, value in tensors.items()}, {"shown": json.dumps(said)})


def _unpacked(data: bytes, device: torch.device) -> dict[Look, Shown]:
    size = int.from_bytes(data[:8], "little")
    said = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["shown"])
    tensors = {name: value.to(device) for name, value in safetensors.torch.load(data).items()}
    found: dict[Look, Shown] = {}
    for at, (look, images) in enumerate(said):
        mine = {name.split("/", 1)[1]: value for name, value in tensors.items() if name.startswith(f"{at}/")}
        inputs = {name.split("/")[1]: value for name, value in mine.items() if name.startswith("input/")}
        features = [mine[name] for name in sorted(mine) if name.startswith("feature/")]
        found[look] = Shown(inputs, features, images)
    return found
