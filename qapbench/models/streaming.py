"""Reads safetensors files one tensor at a time, so that no second copy of a checkpoint is ever in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol

import safetensors
import torch
from torch import Tensor

from qapbench.errors import RunFailedError
from qapbench.memory import give_back_freed

ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"  # lets transformers read a tensor when it is needed, and none ahead


class Weights:
    """An open safetensors file whose tensors are read into memory of their own, at an address that torch aligns.

    It has the part of the interface of `safetensors.safe_open` that transformers needs. That one maps the file into
    memory: the pages that were read count beside the weights that were made of them, and tensors begin wherever the
    file's header happens to end.

    Args:
        path: the file.
        framework, device, backend: as transformers passes them; a file is always read to torch tensors in host memory.
    """

    def __init__(self, path: str | Path, framework: str = "pt", device: str = "cpu", backend: str = "") -> None:
        try:
            self.file: Any = safetensors.safe_open(path, framework="pt", backend="pread")
        except TypeError:  # safetensors before 0.8 can only map it
            self.file = safetensors.safe_open(path, framework="pt")
        self.path = Path(path)

    def __enter__(self) -> Weights:
        self.file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.__exit__(kind, error, trace)

    def keys(self) -> list[str]:
        """Names of the tensors."""
        return list(self.file.keys())

    def metadata(self) -> dict[str, str] | None:
        """What the file says about itself."""
        found: dict[str, str] | None = self.file.metadata()
        return found

    def get_tensor(self, name: str) -> Tensor:
        """Read a tensor."""
        if (stand_in := self._stand_in(name)) is not None:
            return stand_in
        tensor: Tensor = self.file.get_tensor(name).clone()
        return tensor

    def get_slice(self, name: str) -> Part:
        """A tensor that is read when it is indexed."""
        return Part(self, name)

    def _stand_in(self, name: str) -> Tensor | None:
        """What stands for a tensor that is not to be read yet; None for one that is."""
        stand_ins = _stand_ins.get()
        return None if stand_ins is None else stand_ins.of(self, name)


class Part:
    """A tensor of a file that is read when it is indexed.

    Args:
        weights: the file.
        name: name of the tensor.
    """

    def __init__(self, weights: Weights, name: str) -> None:
        self.weights, self.name = weights, name
        self.inner = weights.file.get_slice(name)

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self.inner.get_shape())

    def get_dtype(self) -> str:
        """Its dtype, as the file spells it."""
        return str(self.inner.get_dtype())

    def __getitem__(self, index: Any) -> Tensor:
        if index is Ellipsis:
            return self.weights.get_tensor(self.name)
        read: Tensor = self.inner[index]
        return read.clone()


class StandIns(Protocol):
    """Gives tensors that stand for those that are not to be read yet."""

    def of(self, weights: Weights, name: str) -> Tensor | None:
        """What stands for a tensor of a file; None if it is to be read."""


_stand_ins: ContextVar[StandIns | None] = ContextVar("stand-ins of tensors that are not read yet", default=None)


class HeldFile:
    """A file of a checkpoint that stays open, so that its tensors can be read again whatever becomes of its name.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.weights = Weights(path)
        self._handle: IO[bytes] = path.open("rb")
        self._state = _state(self._handle)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read a tensor, to host memory.

        Raises:
            RunFailedError: the file was changed since it was opened.
        """
        if _state(self._handle) != self._state:
            raise RunFailedError(f"{self._handle.name} was changed while its weights were in use: load the model again")
        return self.weights.get_tensor(name).to(dtype)

    def close(self) -> None:
        """Close the file."""
        self.weights.__exit__(None, None, None)
        self._handle.close()


def _state(handle: IO[bytes]) -> tuple[int, int]:
    """What changes when somebody writes to an open file: its size and the time of the last change."""
    found = os.fstat(handle.fileno())
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def streaming(stand_ins: StandIns | None = None) -> Iterator[None]:
    """While the context is open, transformers' `from_pretrained` reads checkpoints one tensor at a time.

    Args:
        stand_ins: gives what stands for tensors that are not to be read yet; None reads all.
    """
    from transformers import modeling_utils

    library: Any = modeling_utils
    before, waits = library.safe_open, os.environ.get(ONE_BY_ONE)
    library.safe_open, os.environ[ONE_BY_ONE] = Weights, "1"
    token = _stand_ins.set(stand_ins)
    try:
        yield
    finally:
        _stand_ins.reset(token)
        give_back_freed()
        library.safe_open = before
        if waits is None:
            del os.environ[ONE_BY_ONE]
        else:
            os.environ[ONE_BY_ONE] = waits
