"""Where the original weights of linears are while quantized ones are in their place."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from qapbench.checkpoints.find import find_checkpoint
from qapbench.errors import RunFailedError, UserError, nearest
from qapbench.memory import give_back_freed, page_out
from qapbench.models.streaming import HeldFile
from qapbench.models.unread import UnreadWeight

Keep = Literal["auto", "memory", "file", "checkpoint"]
SMALL = 2**28  # bytes of a model's weights up to which "auto" keeps them in memory
GIVE_BACK = 2**26  # bytes of weights after which freed memory is given back to the system


@dataclass(frozen=True)
class SetAside:
    """A weight whose values are elsewhere.

    Attributes:
        read: gives the values, in host memory. It raises a RunFailedError if the file that holds them was changed.
        restore: puts them back, on the device where they were. It raises the same error.
    """

    read: Callable[[], Tensor]
    restore: Callable[[], None]


class Originals:
    """Sets the weights of a model aside, and puts them back exactly.

    The parameter stays the same object. While its values are elsewhere it is empty.

    Args:
        model: the model.
        keep: "memory" moves weights to host memory. "file" writes them to a temporary file. "checkpoint" drops those
            that equal the tensors of the model's checkpoint bit for bit, and reads them there again; others go to a
            temporary file. "auto" is "memory" for a small model, "checkpoint" for others.
        folder: folder of the checkpoint; None takes the one that the model says it was loaded from.

    Raises:
        UserError: there is no such way to keep them.
    """

    def __init__(self, model: nn.Module, keep: str = "auto", folder: Path | None = None) -> None:
        if keep not in get_args(Keep):
            raise UserError(f"keep_originals: no way '{keep}'; {nearest(keep, get_args(Keep))}")
        if keep == "auto":
            small = sum(weight.nbytes for weight in model.parameters()) <= SMALL
            keep = "memory" if small else "checkpoint"
        self.names = {id(weight): name for name, weight in model.named_parameters()}
        held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self._holders = Counter(_storage(tensor) for _, tensor in held)
        self._in_memory = keep == "memory"
        self._checkpoint = _Checkpoint(folder or _folder_of(model)) if keep == "checkpoint" else None
        self._file = _SpillFile()
        self._unreturned = 0

    def close(self) -> None:
        """Close all files. Weights that are still set aside cannot be put back any more."""
        if self._checkpoint is not None:
            self._checkpoint.close()
        self._file.close()

    def set_aside(self, weight: Tensor) -> SetAside:
        """Free the memory of a weight as far as its values can be had elsewhere."""
        device = weight.device
        read = self._elsewhere(weight) if not self._in_memory and self._frees(weight) else None
        if read is None:
            return in_host_memory(weight)
        size = weight.nbytes
        page_out(weight.data)  # transformers may have mapped the checkpoint into memory
        weight.data = weight.data.new_empty(0)
        self.freed(size)

        def restore() -> None:
            weight.data = read().to(device)
            self.freed(size)

        return SetAside(read, restore)

    def freed(self, size: int) -> None:
        """Note that so many bytes became free, and give them back to the system now and then."""
        self._unreturned += size
        if self._unreturned > GIVE_BACK:
            give_back_freed()
            self._unreturned = 0

    def _frees(self, weight: Tensor) -> bool:
        """Whether memory becomes free if the weight lets go of it: nothing else of the model holds it."""
        return weight.is_contiguous() and not weight.is_meta and self._holders[_storage(weight)] <= 1

    def _elsewhere(self, weight: Tensor) -> Callable[[], Tensor] | None:
        """What reads the values of a weight from a file; None if there is no room for them."""
        name = self.names.get(id(weight), "")
        if self._checkpoint is not None and (read := self._checkpoint.holds(name, weight.data)) is not None:
            return read
        try:
            return self._file.write(id(weight), weight.data)
        except OSError:  # the disk is full: memory is what is left
            return None


def in_host_memory(weight: Tensor) -> SetAside:
    """Move a weight to host memory. One that was not read from its checkpoint yet needs none."""
    if isinstance(weight, UnreadWeight):
        return SetAside(weight.read, lambda: None)
    device = weight.device
    weight.data = weight.data.to("cpu")
    return SetAside(lambda: weight.data, lambda: setattr(weight, "data", weight.data.to(device)))


class _Checkpoint:
    """Looks for weights in the files of a checkpoint.

    Names differ between files and models, so tensors are looked up by the ends of their names, and only equal bits
    count.

    Args:
        folder: the checkpoint; None holds nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._files: list[HeldFile] = []
        self._by_end: dict[tuple[str, ...], list[tuple[int, str]]] = defaultdict(list)
        for path in sorted(folder.glob("*.safetensors")) if folder else ():
            with contextlib.suppress(Exception):  # a file that cannot be read holds nothing
                self._files.append(HeldFile(path))
                for name in self._files[-1].weights.keys():  # noqa: SIM118  (the file is no dict)
                    parts = name.split(".")
                    for at in range(len(parts) - 1):
                        self._by_end[tuple(parts[at:])].append((len(self._files) - 1, name))

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
        self._files, self._by_end = [], defaultdict(list)

    def holds(self, name: str, value: Tensor) -> Callable[[], Tensor] | None:
        """What reads the tensor that has the value of a weight; None if there is none.

        Args:
            name: the weight's name in the model.
            value: its value.
        """
        dtype, bits = value.dtype, _bits(value.cpu())
        for index, key in self._candidates(name):
            with contextlib.suppress(RunFailedError):
                read = self._files[index].read(key, dtype)
                if read.shape == value.shape and torch.equal(_bits(read), bits):
                    return functools.partial(self._files[index].read, key, dtype)
        return None

    def _candidates(self, name: str) -> list[tuple[int, str]]:
        """The tensors whose names have the longest end in common with a name."""
        parts = name.split(".")
        ends = (tuple(parts[at:]) for at in range(len(parts) - 1))
        return next((found for end in ends if (found := self._by_end.get(end))), [])


class _SpillFile:
    """A temporary file with a place for each weight, which is gone when nobody uses it any more."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._places: dict[int, tuple[int, int]] = {}
        self._end = 0

    def close(self) -> None:
        """Delete the file."""
        if self._handle is not None:
            self._handle.close()
            self._handle, self._places, self._end = None, {}, 0

    def write(self, key: int, value: Tensor) -> Callable[[], Tensor]:
        """Write a value, and return what reads it.

        Args:
            key: what the place in the file belongs to.
            value: the value.

        Raises:
            OSError: there is no room.
        """
        if self._handle is None:
            self._handle = tempfile.TemporaryFile(prefix="qapbench-", buffering=0)  # noqa: SIM115  (as long as it lives)
        data = _bits(value.cpu()).numpy().data
        at, size = self._places.get(key, (self._end, -1))
        if size != len(data):
            at = self._end
        self._handle.seek(at)
        left = memoryview(data)
        while left:
            left = left[self._handle.write(left) :]
        self._places[key] = at, len(data)
        self._end = max(self._end, at + len(data))
        shape, dtype = value.shape, value.dtype

        def read() -> Tensor:
            found = torch.empty(shape, dtype=dtype)
            self._handle.seek(at)
            into = memoryview(_bits(found).numpy().data)
            while into:
                count = self._handle.readinto(into)
                if not count:
                    raise RunFailedError("the temporary file of original weights is cut: load the model again")
                into = into[count:]
            return found

        return read


def _folder_of(model: Any) -> Path | None:
    """Folder of the checkpoint that a model says it was loaded from; None if it says none, or it is not there."""
    named = getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        return find_checkpoint(str(named), fetch=False).folder if named else None
    except UserError:
        return None


def _bits(value: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, flat."""
    return value.detach().contiguous().flatten().view(torch.uint8)


def _storage(value: Tensor) -> Any:
    """What tells the memory of a tensor from that of others."""
    return value.device, value.untyped_storage().data_ptr()
