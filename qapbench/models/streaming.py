"""Reads safetensors files one tensor at a time, so that no second copy of a checkpoint is ever in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors
from torch import Tensor

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
        tensor: Tensor = self.file.get_tensor(name).clone()
        return tensor

    def get_slice(self, name: str) -> Part:
        """A tensor that is read when it is indexed."""
        return Part(self.file.get_slice(name))


class Part:
    """A tensor of a file that is read when it is indexed.

    Args:
        inner: what safetensors' `get_slice` returned.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self.inner.get_shape())

    def get_dtype(self) -> str:
        """Its dtype, as the file spells it."""
        return str(self.inner.get_dtype())

    def __getitem__(self, index: Any) -> Tensor:
        read: Tensor = self.inner[index]
        return read.clone()


@contextlib.contextmanager
def streaming() -> Iterator[None]:
    """While the context is open, transformers' `from_pretrained` reads checkpoints one tensor at a time."""
    from transformers import modeling_utils

    library: Any = modeling_utils
    before, waits = library.safe_open, os.environ.get(ONE_BY_ONE)
    library.safe_open, os.environ[ONE_BY_ONE] = Weights, "1"
    try:
        yield
    finally:
        give_back_freed()
        library.safe_open = before
        if waits is None:
            del os.environ[ONE_BY_ONE]
        else:
            os.environ[ONE_BY_ONE] = waits
