"""Holds pruned prompts until a later quantizer needs them: in memory up to a limit, or in a memory-mapped file."""

from __future__ import annotations

import json
import mmap
import tempfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from qapbench.files import naming
from qapbench.prune.prompt import PrunedPrompt
from qapbench.receipt import ImageTokens

from .plan import PruneKey


class FeatureCache:
    """Holds pruned prompts that a later group of runs will ask for.

    Args:
        limit: bytes in memory. Prompts that exceed it are not kept, and their images will be encoded again.
        spill: folder for a file that holds all prompts instead of memory; it vanishes with the process.
    """

    def __init__(self, limit: int, spill: Path | None = None) -> None:
        self.limit = limit
        self.used = 0
        self._held: dict[Any, dict[PruneKey, PrunedPrompt]] = {}
        self._places: dict[Any, tuple[int, int]] = {}
        self._free: list[tuple[int, int]] = []
        self._file: Any = None
        self._end = 0
        self.spill = spill or Path()
        if spill is not None:
            spill.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=spill, prefix="features-")  # noqa: SIM115

    def put(self, name: Any, prompts: dict[PruneKey, PrunedPrompt]) -> None:
        """Keep prompts of one question, if there is room.

        Args:
            name: identifies the question and its text.
            prompts: prune key -> prompt.
        """
        if self._file is not None:
            data = _packed(prompts)
            start = self._room(len(data))
            self._places[name] = start, len(data)
            with naming(self.spill):
                self._file.seek(start)
                self._file.write(data)
                self._file.flush()
            return
        kept = {key: _placed(one, torch.device("cpu")) for key, one in prompts.items()}
        if self.used + _size(kept) <= self.limit:
            self._held[name] = kept
            self.used += _size(kept)

    def get(self, name: Any, device: torch.device) -> dict[PruneKey, PrunedPrompt]:
        """The prompts that were put under a name, by prune key; empty if there are none.

        Args:
            name: as given to `put`.
            device: device to put their tensors on.
        """
        if name in self._places:
            start, size = self._places[name]
            with mmap.mmap(self._file.fileno(), size, offset=start, access=mmap.ACCESS_READ) as view:
                return _unpacked(view[:], device)
        return {key: _placed(one, device) for key, one in self._held.get(name, {}).items()}

    def drop(self, name: Any) -> None:
        """Forget a name that no later group will ask for. Its room in the file is used again."""
        if name in self._places:
            start, size = self._places.pop(name)
            self._free.append((start, _rounded(size)))
        self.used -= _size(self._held.pop(name, {}))

    def _room(self, size: int) -> int:
        """Where in the file there is room for that many bytes: the smallest free place, or the end."""
        fitting = [place for place in self._free if place[1] >= size]
        if not fitting:
            start, self._end = self._end, self._end + _rounded(size)
            return start
        place = min(fitting, key=lambda free: free[1])
        self._free.remove(place)
        start, room = place
        if room > _rounded(size):
            self._free.append((start + _rounded(size), room - _rounded(size)))
        return start

    def close(self) -> None:
        """Forget everything, and delete the file."""
        self._held.clear()
        self._places.clear()
        self._free.clear()
        self.used = self._end = 0
        if self._file is not None:
            self._file.close()


def _rounded(size: int) -> int:
    """The size of a place in the file: a mapping may begin only at multiples of the system's granularity."""
    return -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


def _placed(prompt: PrunedPrompt, device: torch.device) -> PrunedPrompt:
    """What is kept of a prompt, on a device. A part of a larger tensor is copied, so that the rest need not be kept."""

    def own(value: Tensor) -> Tensor:
        there = value.to(device)
        return there if there.untyped_storage().nbytes() == there.nbytes else there.clone()

    inputs = {name: own(value) for name, value in prompt.inputs.items()}
    return PrunedPrompt(inputs, [own(value) for value in prompt.features], prompt.images, removed=prompt.removed)


def _size(prompts: dict[PruneKey, PrunedPrompt]) -> int:
    """Bytes of the tensors of prompts."""
    return sum(value.nbytes for one in prompts.values() for value in (*one.inputs.values(), *one.features))


def _packed(prompts: dict[PruneKey, PrunedPrompt]) -> bytes:
    """The prompts as bytes in safetensors format, which restores them bit for bit."""
    tensors: dict[str, Tensor] = {}
    said: list[Any] = []
    for at, (prune_key, one) in enumerate(prompts.items()):
        said.append([prune_key, [image.to_json() for image in one.images], one.removed])
        tensors |= {f"{at}/input/{name}": value.clone().contiguous() for name, value in one.inputs.items()}
        tensors |= {f"{at}/feature/{i:04}": value.clone().contiguous() for i, value in enumerate(one.features)}
    return safetensors.torch.save({name: value.cpu() for name, value in tensors.items()}, {"prompts": json.dumps(said)})


def _unpacked(data: bytes, device: torch.device) -> dict[PruneKey, PrunedPrompt]:
    """The prompts from bytes of `_packed`, on a device."""
    size = int.from_bytes(data[:8], "little")
    said = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["prompts"])
    tensors = {name: value.to(device) for name, value in safetensors.torch.load(data).items()}
    found: dict[PruneKey, PrunedPrompt] = {}
    for at, (prune_key, images, removed) in enumerate(said):
        mine = {name.split("/", 1)[1]: value for name, value in tensors.items() if name.startswith(f"{at}/")}
        inputs = {name.split("/")[1]: value for name, value in mine.items() if name.startswith("input/")}
        features = [mine[name] for name in sorted(mine) if name.startswith("feature/")]
        tokens = [ImageTokens.model_validate(image) for image in images]
        found[prune_key] = PrunedPrompt(inputs, features, tokens, removed=removed)
    return found
