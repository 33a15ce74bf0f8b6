"""Backends that run a quantized matmul: simulation in the model's own precision, or a library's low-bit kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from qapbench.errors import Problem, UserError
from qapbench.methods.formats import Format
from qapbench.methods.plans import LinearPlan
from qapbench.models.unread import values
from qapbench.spec.backend import Backend

from .install import installed, replaced
from .measured_bits import ROWS
from .originals import Originals
from .receipts import LinearReceipt


@contextlib.contextmanager
def int8_linear(
    linear: nn.Linear, plan: LinearPlan, line: LinearReceipt, originals: Originals | None = None
) -> Iterator[None]:
    """Run a linear on torchao's int8 kernel while the context is open.

    The kernel has an int8 weight with one scale per output channel, an int8 input with one scale per token, and int32
    sums.

    Args:
        linear: the layer.
        plan: its plan, which must consist of a `Format` on each side and optionally a transform.
        line: receipt of the layer, filled with what the kernel holds: the type of its weight, and whether it quantizes
            its input.
        originals: where the original weight is meanwhile; None keeps it in host memory.

    Raises:
        UserError: torchao is not installed, or the plan is a different one.
    """
    if not (isinstance(plan.weight, Format) and isinstance(plan.activation, Format)):
        raise UserError(
            Problem("torchao cannot run this method's linears; leave `backend` out", ("quantize", "backend"))
        )
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        raise _missing() from None
    original = values(linear.weight)
    new = original if plan.transform is None else plan.transform.weight(original).to(original.dtype)
    holder = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    holder.weight = nn.Parameter(new, requires_grad=False)
    quantize_(nn.Sequential(holder), Int8DynamicActivationInt8WeightConfig())
    weight: Any = holder.weight
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(linear, weight, originals))
        if plan.transform is not None:
            input_only = LinearPlan(transform=plan.transform)
            stack.enter_context(installed(linear, input_only, weight_too=False))
        line.weight_bits = torch.iinfo(weight.qdata.dtype).bits
        line.weight_levels = max(len(row.unique()) for row in weight.qdata[:ROWS])
        stack.callback(
            linear.register_forward_pre_hook(_count(line, quantizes=weight.act_quant_kwargs is not None)).remove
        )
        yield


def _count(line: LinearReceipt, quantizes: bool) -> Any:
    """A hook that records each call and the bits of the input.

    `quantizes` says whether the kernel quantizes its input.
    """

    def count(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        line.activation_bits = 8 if quantizes else torch.finfo(args[0].dtype).bits
        line.calls += 1

    return count


def describe(backend: Backend, device: torch.device) -> str:
    """Name the backend in one line, for the receipt.

    Raises:
        UserError: the backend's library is not installed.
    """
    if backend == "simulate":
        return "simulation: quantized values, multiplied in the model's own precision"
    try:
        return f"torchao {version('torchao')} int8 kernels on {device.type}"
    except PackageNotFoundError:
        raise _missing() from None


def _missing() -> UserError:
    return UserError(Problem("torchao is not installed: pip install 'qapbench[torchao]'", ("quantize", "backend")))
