"""Several devices on a machine that has none: tensors that say they are on one, and meet no tensor of another.

A `Far` tensor says that it is on "far:0", "far:1" and so on. It holds a tensor in host memory that computes, so values
are those of a CPU to the bit. As on GPUs, an operation raises an error if its tensors are on several devices, unless it
copies between them or one is a number on the CPU. What this does not show: kernels, streams and memory of real devices.

Importing this module and registering the device type change what torch does in this process for good, so only a process
of its own does it, and before it imports what uses `torch.inference_mode`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

KIND = "far"
CPU = torch.device("cpu")
# A wrapper made in inference mode has views that torch refuses; without gradients, everything else is the same.
torch.inference_mode = lambda mode=True: torch.no_grad() if mode else nullcontext()
COPIES = ("copy_", "_to_copy", "set_")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")


class Mixed(RuntimeError):
    """An operation got tensors of several devices."""


class Far(Tensor):
    """A tensor that says it is on a device of its own.

    Args:
        inner: the values, in host memory.
        device: where it says it is.
    """

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Far:
        made: Any = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner
        return made

    def __init__(self, inner: Tensor, device: torch.device) -> None:
        super().__init__()

    def __repr__(self, **_: Any) -> str:
        return f"Far({self.inner}, {self.device})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert a tensor on {self.device} to numpy")

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:  # torch lets no wrapper become a plain tensor: it stays on its device
        self.inner = values.inner if isinstance(values, Far) else values

    def untyped_storage(self) -> Any:  # only to tell which tensors share one
        return self.inner.untyped_storage()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, dict(kwargs or {}))


class FarMode(TorchDispatchMode):
    """Makes new tensors on far devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, dict(kwargs or {}))


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of an operation, on the device of its tensors.

    Raises:
        Mixed: they are on several.
    """
    name = func.overloadpacket.__name__
    places: list[torch.device] = []
    changed: dict[int, Far] = {}

    def opened(value: Any, counts: bool = True) -> Any:
        """The value with plain tensors in it. Their devices are noted."""
        if isinstance(value, Far):
            changed[id(value.inner)] = value
            if value.device not in places:
                places.append(value.device)
            return value.inner
        if isinstance(value, Tensor):  # a GPU takes numbers and indices that are in host memory
            if counts and value.dim() and value.device not in places:
                places.append(value.device)
            return value
        if isinstance(value, list | tuple):
            return type(value)([opened(one, counts) for one in value])
        return value

    given = [opened(value, not (name in INDEXED and at == 1)) for at, value in enumerate(args)]
    named = {key: opened(value) for key, value in kwargs.items()}
    if len(places) > 1 and name not in COPIES:
        raise Mixed(f"{name}: tensors on {', '.join(map(str, places))}")
    home = places[0] if places else CPU
    if (target := kwargs.get("device")) is not None:
        home, named["device"] = torch.device(target), CPU

    def closed(value: Any) -> Any:
        """The value with its tensors on their device; those that were changed in place are the same objects."""
        if isinstance(value, Tensor):
            return changed[id(value)] if id(value) in changed else Far(value, home)
        if isinstance(value, list | tuple):
            return type(value)([closed(one) for one in value])
        return value

    out = func(*given, **named)
    return closed(out) if home.type == KIND else out


@contextmanager
def devices() -> Iterator[list[torch.device]]:
    """While the context is open, two far devices can be computed on."""
    _setup_privateuseone_for_python_backend(KIND)
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes its values on the CPU, and then copies them
    try:
        with FarMode():
            yield [torch.device(KIND, index) for index in range(2)]
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


def spread(model: nn.Module, places: dict[str, str]) -> nn.Module:
    """A model spread over devices by accelerate, as transformers does it.

    Args:
        model: the model.
        places: names of modules -> their devices.
    """
    from accelerate import dispatch_model

    skip = getattr(model, "_skip_keys_device_placement", None)
    placed: nn.Module = dispatch_model(model, places, main_device=f"{KIND}:0", skip_keys=skip, force_hooks=True)
    return placed
