"""Plans put on linears for a while, and taken off to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .quantization import Format, LinearPlan, Tokens

Look = Callable[[], Tokens | None]
"""What is known of the tokens of the call that is under way."""
HELD = "_qapbench_quantized"


@contextlib.contextmanager
def installed(
    linear: nn.Linear, plan: LinearPlan, tokens: Look = lambda: None, weight_too: bool = True
) -> Iterator[None]:
    """The linear as planned: its weight replaced, its input and output passed through hooks.

    Args:
        weight_too: False where something else has put the weight in place.
    """
    with contextlib.ExitStack() as stack:
        if weight_too and (plan.weight is not None or plan.transform is not None):
            stack.enter_context(replaced(linear, plan.new_weight(linear.weight.detach())))
        if plan.changes_input:
            stack.callback(linear.register_forward_pre_hook(_input_hook(plan, tokens)).remove)
        if plan.transform is not None and (output := plan.transform.output) is not None:
            hook = linear.register_forward_hook(lambda _module, _args, y: output(y).to(y.dtype))
            stack.callback(hook.remove)
        yield


@contextlib.contextmanager
def installed_all(linears: Mapping[str, nn.Linear], plan: LinearPlan, tokens: Look = lambda: None) -> Iterator[None]:
    """Several linears by one plan, for a trial."""
    with contextlib.ExitStack() as stack:
        for linear in linears.values():
            stack.enter_context(installed(linear, plan, tokens))
        yield


@dataclasses.dataclass
class _Held:
    """A tensor as quantized, kept on the tensor itself and as long as it: q, k and v read one, gate and up another."""

    format: Format
    value: Tensor
    readers: set[int]


def _input_hook(plan: LinearPlan, tokens: Look) -> Any:
    shared: Format | None = None  # what a token gets from it depends on nothing but the token
    if isinstance(plan.activation, Format) and plan.activation.granularity == "row" and plan.transform is None:
        shared = plan.activation

    def quantize(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        held: _Held | None = getattr(x, HELD, None)
        # Who reads it a second time may have been given a buffer that was filled anew.
        if held is not None and held.format is shared and id(module) not in held.readers:
            held.readers.add(id(module))
            return held.value, *args[1:]
        new = plan.new_input(x, tokens())
        if shared is not None and new is not x and not new.requires_grad:
            setattr(x, HELD, _Held(shared, new, {id(module)}))
        return new, *args[1:]

    return quantize


@contextlib.contextmanager
def replaced(linear: nn.Linear, weight: Tensor) -> Iterator[None]:
    """Another weight for a while. The original waits in host memory where it would crowd a GPU."""
    original = linear.weight
    device = original.device
    linear.weight = nn.Parameter(weight, requires_grad=False)
    original.data = original.data.to("cpu")
    try:
        yield
    finally:
        original.data = original.data.to(device)
        linear.weight = original


@contextlib.contextmanager
def watching(core: nn.Module | None, image_token: int) -> Iterator[Look]:
    """What is known of the tokens of the call under way in `core`, the module that takes `input_ids`."""
    if core is None:
        yield lambda: None
        return
    latest: list[Tokens | None] = [None]

    def enter(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        latest[0] = tokens_of(kwargs, image_token)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        latest[0] = None

    handles = [
        core.register_forward_pre_hook(enter, with_kwargs=True),
        core.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield lambda: latest[0]
    finally:
        for handle in handles:
            handle.remove()


def tokens_of(inputs: Mapping[str, Any], image_token: int) -> Tokens | None:
    """From a model's keyword arguments; None where there are no `input_ids`."""
    ids = inputs.get("input_ids")
    if ids is None:
        return None
    past = inputs.get("past_key_values")
    mask = inputs.get("attention_mask")
    valid = torch.ones_like(ids, dtype=torch.bool)
    if mask is not None and mask.ndim == 2:
        valid = mask[:, -ids.shape[1] :].bool()
    return Tokens(ids == image_token, valid, prefill=past is None or not past.get_seq_length())
