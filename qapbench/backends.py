"""What multiplies: a simulation in the model's own precision, or a library's low-bit kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import nn

from .errors import Problem, UserError
from .install import installed, replaced
from .quantization import Format, LinearPlan
from .receipt import ROWS, LinearReceipt

Backend = Literal["simulate", "torchao"]


def check_backend(backend: Backend, weights: Format | None, activations: Format | None) -> None:
    """Raise UserError where a backend has no kernel for these formats."""
    if backend == "simulate":
        return
    asked = "W{}A{}".format(*(f.bits if f else 16 for f in (weights, activations)))
    if not (_is_int8(weights) and _is_int8(activations)):
        message = (
            f"torchao runs W8A8, both sides `{{bits: 8, symmetric: true}}`; for {asked} as written only simulation "
            "exists: leave `backend` out"
        )
        raise UserError(Problem(message, ("backend",)))


def _is_int8(format: Format | None) -> bool:
    return format is not None and format.bits == 8 and format.symmetric and format.group_size is None


@contextlib.contextmanager
def int8_linear(linear: nn.Linear, plan: LinearPlan, line: LinearReceipt) -> Iterator[None]:
    """The linear on torchao's int8 kernel: int8 weight per output channel, int8 input per token, int32 sums.

    The receipt's line is filled with what the kernel holds: the type of its weight, and that it quantizes its input.

    Raises:
        UserError: torchao is not installed, or the plan is more than two plain formats.
    """
    if not (isinstance(plan.weight, Format) and isinstance(plan.activation, Format)):
        raise UserError(
            Problem("torchao cannot run this method's linears; leave `backend` out", ("quantize", "backend"))
        )
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        raise _missing() from None
    original = linear.weight
    new = original.detach() if plan.transform is None else plan.transform.weight(original.detach()).to(original.dtype)
    holder = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    holder.weight = nn.Parameter(new, requires_grad=False)
    quantize_(nn.Sequential(holder), Int8DynamicActivationInt8WeightConfig())
    weight: Any = holder.weight
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(linear, weight))
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
    def look(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        line.activation_bits = 8 if quantizes else torch.finfo(args[0].dtype).bits
        line.calls += 1

    return look


def describe(backend: Backend, device: torch.device) -> str:
    """What ran, for the receipt."""
    if backend == "simulate":
        return "simulation: quantized values, multiplied in the model's own precision"
    try:
        return f"torchao {version('torchao')} int8 kernels on {device.type}"
    except PackageNotFoundError:
        raise _missing() from None


def _missing() -> UserError:
    return UserError(Problem("torchao is not installed: pip install 'qapbench[torchao]'", ("quantize", "backend")))
