"""Linears whose weights are stored packed, and computed anew for each product in one buffer that all of them share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qapbench.errors import Problem, UserError
from qapbench.methods.packed import CannotPackError, PackedWeight
from qapbench.methods.plans import LinearPlan

from .install import replaced
from .originals import Originals

_held: WeakKeyDictionary[nn.Linear, PackedWeight] = WeakKeyDictionary()


class Buffer:
    """Memory for the weight of the linear that runs now; it grows to the largest weight of a model."""

    def __init__(self) -> None:
        self._held: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def of(self, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        """The values [out, in] of a weight. They are overwritten by the next call."""
        device, (rows, width) = weight.codes.device, weight.shape
        held = self._held.get((device, dtype))
        if held is None or held.numel() < rows * width:
            with torch.inference_mode(False):  # a buffer that is made in inference mode cannot be used outside
                held = self._held[device, dtype] = torch.empty(rows * width, dtype=dtype, device=device)
        values = held[: rows * width].view(rows, width)
        weight.write(values)
        return values


def packed_weight(plan: LinearPlan, weight: Tensor, name: str, method: str) -> PackedWeight:
    """The packed weight that a plan makes of a linear's. Its values are those of the plan, to the bit.

    Args:
        plan: plan of the linear, which quantizes the weight.
        weight: [out, in], the original.
        name: name of the linear.
        method: name of the method.

    Raises:
        UserError: the weight has no codes and scales that give these values.
    """
    why = "rounds it in a way of its own"
    try:
        packed = plan.packed(weight)
    except CannotPackError as error:
        packed, why = None, f"leaves it so that {error}"
    if packed is not None:
        known = isinstance(plan.weight, PackedWeight)  # its values are those of its codes
        if known or packed.equals(plan.new_weight(weight)):
            return packed
        why = "rounds it to other values"
    message = f"'packed' stores {name} as codes and scales, and the method {method} {why}; take `storage: unpacked`"
    raise UserError(Problem(message, ("quantize", "storage")))


@contextlib.contextmanager
def held_packed(
    linear: nn.Linear, weight: PackedWeight, buffer: Buffer, originals: Originals | None = None
) -> Iterator[None]:
    """While the context is open, a linear has a packed weight, whose values exist only while it multiplies.

    In between, its parameter keeps shape, dtype and device, but is one NaN: whoever reads it without a forward pass
    must not get numbers. Where gradients are recorded, the values get memory of their own, since they are read again.

    Args:
        linear: the linear.
        weight: its weight, on the device of the linear.
        buffer: where the values are written to.
        originals: where the original weight is meanwhile; None keeps it in host memory.
    """
    dtype, device, shape = linear.weight.dtype, linear.weight.device, linear.weight.shape
    with contextlib.ExitStack() as stack:
        with torch.inference_mode(False):  # a parameter that is made in inference mode takes no other values
            nothing = torch.full((1, 1), torch.nan, dtype=dtype, device=device).expand(shape)
            stack.enter_context(replaced(linear, nothing, originals))
        stack.callback(_held.pop, linear, None)
        _held[linear] = weight
        parameter = linear.weight

        def fill(module: nn.Module, args: tuple[Any, ...]) -> None:
            recorded = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
            parameter.data = weight.dequantized(dtype) if recorded else buffer.of(weight, dtype)

        def empty(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            parameter.data = nothing

        stack.callback(linear.register_forward_pre_hook(fill).remove)
        stack.callback(linear.register_forward_hook(empty, always_call=True).remove)
        yield


def packed_weight_of(linear: nn.Linear) -> PackedWeight | None:
    """The packed weight that a linear has now; None if its weight is not packed."""
    return _held.get(linear)
