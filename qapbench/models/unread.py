"""Weights whose values exist only while something computes with them: they are in the file of the checkpoint, or in
memory in the 16 bits that they were stored in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.utils._pytree import tree_map_only

from .streaming import HeldFile, Weights

MATRICES = (".layers.", ".blocks.")  # parts of the names of weights that may stay unread: those of a stack of layers
FLOATS = ("F16", "BF16", "F32")  # their dtypes, as a file spells them
ROWS = 1024  # rows of a matrix that are looked at together


class UnreadWeight(Tensor):
    """A matrix in the file of a checkpoint, which takes no memory, or in memory in fewer bits than it computes with.

    It has shape, dtype and device of the weight. Whatever computes with it reads the values, uses them, and forgets
    them. It cannot be written to.

    Args:
        source: reads the values from a file, to host memory; or is the values in a narrower dtype, on the device.
        like: a tensor of this shape, dtype and device, whose values do not matter.

    Attributes:
        source: as given.
    """

    source: Callable[[], Tensor] | Tensor

    def __new__(cls, source: Callable[[], Tensor] | Tensor, like: Tensor) -> UnreadWeight:
        """Make one that is a parameter."""
        made: Any = stand_in(tuple(like.shape), like.dtype, like.device).as_subclass(cls)
        made.source, made._is_param = source, True
        found: UnreadWeight = made
        return found

    def __init__(self, source: Callable[[], Tensor] | Tensor, like: Tensor) -> None:
        super().__init__()

    @property
    def held_bytes(self) -> int:
        """Bytes of memory that it takes."""
        return self.source.nbytes if isinstance(self.source, Tensor) else 0

    def read(self) -> Tensor:
        """The values, in memory of their own on the weight's device.

        Raises:
            RunFailedError: the file was changed since the model was loaded.
        """
        return self.source.to(self.dtype) if isinstance(self.source, Tensor) else self.source().to(self.device)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute with the values, unless only shape, dtype or device are asked for."""
        kwargs = kwargs or {}
        if func in ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.detach:
            return args[0]
        if func is embedding and isinstance(weight := args[1], UnreadWeight) and isinstance(weight.source, Tensor):
            return embedding(args[0], weight.source, *args[2:], **kwargs).to(weight.dtype)
        target = args[0] if args else None
        if isinstance(target, UnreadWeight) and _writes(func):
            raise RuntimeError("a weight that is still in its file cannot be written to; take its values by `values`")
        given, named = tree_map_only(UnreadWeight, lambda weight: weight.read(), (args, dict(kwargs)))
        return func(*given, **named)


ABOUT = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "nbytes", "itemsize")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "grad", "grad_fn", "is_cpu", "is_cuda")),
    *(getattr(Tensor, name).__get__ for name in ("is_meta", "is_sparse", "is_quantized", "_version")),
    *(Tensor.size, Tensor.stride, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_contiguous, Tensor.is_inference, Tensor.is_complex, Tensor.__hash__),
    *(Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage_offset, Tensor.requires_grad_),
    Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
}
"""What needs no values."""


def _writes(func: Any) -> bool:
    """Whether a function changes the tensor that it is given first."""
    name = getattr(func, "__name__", "")
    return name in ("__set__", "__setitem__") or (name.endswith("_") and not name.startswith("__"))


def values(weight: Tensor) -> Tensor:
    """The values of a weight, without a gradient; they are read if they are still in a file."""
    return weight.read() if isinstance(weight, UnreadWeight) else weight.detach()


def row_blocks(weight: Tensor, step: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a weight, `step` at a time: which they are, and their values. They are read as they are asked for."""
    narrow = weight.source if isinstance(weight, UnreadWeight) and isinstance(weight.source, Tensor) else None
    whole = values(weight) if narrow is None else narrow
    for at in range(0, len(whole), step):
        block = slice(at, at + step)
        yield block, whole[block].to(weight.dtype)


@contextlib.contextmanager
def present(linears: Iterable[nn.Linear]) -> Iterator[None]:
    """While the context is open, the weights of some linears are in memory."""
    unread = [(linear, linear.weight) for linear in linears if isinstance(linear.weight, UnreadWeight)]
    try:
        for linear, weight in unread:
            linear.weight = nn.Parameter(values(weight), requires_grad=False)
        yield
    finally:
        for linear, weight in unread:
            linear.weight = weight


def any_unread(model: nn.Module) -> bool:
    """Whether a model has weights that are read when something computes with them."""
    return any(isinstance(weight, UnreadWeight) for weight in model.parameters())


def read_all(model: nn.Module) -> None:
    """Read all weights of a model that are not read yet, for good."""
    read_some(model, lambda weight: True)


def read_some(model: nn.Module, which: Callable[[UnreadWeight], bool]) -> None:
    """Read weights of a model that are not read yet, for good.

    Args:
        model: the model.
        which: says of a weight whether it is read, when those before it are.
    """
    read: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(weight, UnreadWeight) and (id(weight) in read or which(weight)):
                if id(weight) not in read:
                    read[id(weight)] = nn.Parameter(weight.read(), requires_grad=False)
                setattr(module, name, read[id(weight)])


def narrow(model: nn.Module, without: Iterable[nn.Linear] = (), in_files_too: bool = False) -> None:
    """Hold the float32 matrices of a model in 16 bits where their values fit into them, as those of a checkpoint do
    that was stored in 16 bits. Whatever computes with one gets the same float32 values as before.

    Args:
        model: the model.
        without: linears that are left as they are.
        in_files_too: read those that are still in files, one after the other; they do not stay there.
    """
    left = {id(linear.weight) for linear in without}
    found: dict[int, UnreadWeight] = {}
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Embedding) or id(weight := module.weight) in left:
            continue
        if isinstance(weight, UnreadWeight) and not in_files_too:
            continue
        if id(weight) not in found and (fewer := _in_16_bits(values(weight))) is not None:
            found[id(weight)] = UnreadWeight(fewer, weight)
        if id(weight) in found:
            module.weight = found[id(weight)]
    if in_files_too:
        read_some(model, lambda weight: not isinstance(weight.source, Tensor))


def _in_16_bits(weight: Tensor) -> Tensor | None:
    """The values of a float32 matrix in 16 bits; None if they do not fit, or it is no such matrix in memory."""
    if weight.dtype != torch.float32 or weight.is_meta:
        return None
    for dtype in (torch.bfloat16, torch.float16):
        if _fits(weight[:1], dtype) and all(_fits(some, dtype) for some in weight.split(ROWS)):
            return weight.detach().to(dtype)
    return None


def _fits(matrix: Tensor, dtype: torch.dtype) -> bool:
    """Whether no bit is lost in another dtype."""
    return torch.equal(matrix.to(dtype).float().view(torch.int32), matrix.detach().view(torch.int32))


def stand_in(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a shape that holds one NaN, at an address of its own."""
    return torch.full((1,) * len(shape), torch.nan, dtype=dtype, device=device).expand(shape)


def may_wait(name: str, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a file may be left there while the model is loaded: it is the matrix of a layer.

    Args:
        name: its name.
        dtype: its dtype, as the file spells it.
        shape: its shape.
    """
    return is_matrix(name, dtype, shape) and in_a_layer(name)


def in_a_layer(name: str) -> bool:
    """Whether a tensor or a module belongs to a stack of layers, by its name."""
    return any(part in name for part in MATRICES)


def is_matrix(name: str, dtype: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a file is the matrix of a linear or of embeddings. The arguments are those of `may_wait`."""
    return len(shape) == 2 and name.endswith(".weight") and dtype in FLOATS


class _Unplaced(Tensor):
    """A stand-in whose device is not known yet: it is the one that it is moved to."""

    place: Callable[[torch.device], Tensor]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Stand on a device, without taking more memory there than one value."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is Tensor.to and kwargs.get("device") is not None and kwargs.get("dtype") in (None, args[0].dtype):
                return args[0].place(torch.device(kwargs["device"]))
            return func(*args, **kwargs)


class Postponed:
    """Leaves the matrices of layers in their files while a model is loaded; see `streaming`.

    Args:
        dtype: dtype of the model.
        device: device of the model; None where several share it, and the loader moves each tensor to its own.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | None) -> None:
        self.dtype, self.device = dtype, device
        self._files: dict[Path, HeldFile] = {}
        self._given: dict[int, tuple[Tensor, HeldFile, str]] = {}

    def of(self, weights: Weights, name: str) -> Tensor | None:
        """What stands for a matrix of a layer; None for any other tensor."""
        part = weights.file.get_slice(name)
        shape = tuple(part.get_shape())
        if not may_wait(name, str(part.get_dtype()), shape):
            return None
        file = self._files.get(weights.path) or self._files.setdefault(weights.path, HeldFile(weights.path))
        given = stand_in(shape, self.dtype, self.device or torch.device("cpu"))
        self._given[given.untyped_storage().data_ptr()] = given, file, name
        if self.device is not None:
            return given
        unplaced: Any = given.as_subclass(_Unplaced)
        unplaced.place = functools.partial(self._place, given)
        found: Tensor = unplaced
        return found

    def _place(self, given: Tensor, device: torch.device) -> Tensor:
        """A stand-in on a device in place of another one."""
        _, file, name = self._given.pop(given.untyped_storage().data_ptr())
        placed = stand_in(tuple(given.shape), self.dtype, device)
        self._given[placed.untyped_storage().data_ptr()] = placed, file, name
        return placed

    def settle(self, model: nn.Module, linears: Iterable[nn.Linear]) -> bool:
        """Give a loaded model its weights: unread ones to some linears, and values to all others.

        Args:
            model: the model.
            linears: those whose weights stay in their files.

        Returns:
            Whether every tensor that was left in its file is one of the model's weights. If not, one was changed while
            the model was loaded, and the model is of no use.
        """
        holders: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                holders.setdefault(weight.untyped_storage().data_ptr(), []).append((module, name))
        given_out, self._given = self._given, {}
        if any(place not in holders for place in given_out):
            return False
        wanted = {id(linear) for linear in linears}
        for place, (given, file, key) in given_out.items():
            held = holders[place]
            if any(getattr(module, name).shape != given.shape for module, name in held):
                return False
            left: Any = UnreadWeight(functools.partial(file.read, key, self.dtype), given)
            if len(held) > 1 or id(held[0][0]) not in wanted:
                left = nn.Parameter(left.read(), requires_grad=False)
            for module, name in held:
                setattr(module, name, left)
        return True
