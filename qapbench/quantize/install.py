"""Install quantization plans on linear layers and restore the originals exactly."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from qapbench.methods.formats import Format
from qapbench.methods.plans import LinearPlan
from qapbench.models.unread import values

from .call_tokens import TokenContext
from .originals import Originals, in_host_memory


@dataclasses.dataclass
class _Quantized:
    """A quantized input, the versions of the input and of it, and its readers so far (ids)."""

    format: Format
    value: Tensor
    versions: tuple[int, int]
    readers: set[int]


class SharedInputs:
    """Quantized inputs that several linears read: query, key and value share one, gate and up another.

    An input is held as long as the tensor that it was made of lives. What may be shared is a row-wise format without a
    transform, where a token's result depends on nothing but the token. A change in place is seen by a tensor's version.
    Tensors of `torch.inference_mode` have none, and to compare them with copies costs more than to quantize them again,
    so those are not shared.
    """

    def __init__(self) -> None:
        self._held: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def quantized(self, x: Tensor, format: Format, reader: nn.Module, make: Callable[[], Tensor]) -> Tensor:
        """The quantized input: as an earlier reader left it, or made now."""
        if x.is_inference():
            return make()
        held: _Quantized | None = self._held.get(x)
        # A second read by the same layer means the buffer was refilled; recompute.
        readable = held is not None and held.format is format and id(reader) not in held.readers
        if held is not None and readable and held.versions == (x._version, held.value._version):
            held.readers.add(id(reader))
            return held.value
        new = make()
        if new is not x and not new.requires_grad and not new.is_inference():
            self._held[x] = _Quantized(format, new, (x._version, new._version), {id(reader)})
        return new


@contextlib.contextmanager
def installed(
    linear: nn.Linear,
    plan: LinearPlan,
    tokens: TokenContext = lambda: None,
    weight_too: bool = True,
    shared: SharedInputs | None = None,
    originals: Originals | None = None,
) -> Iterator[None]:
    """Replace the linear's weight and pass its input and output through hooks, as planned, while the context is open.

    Args:
        tokens: what is known of the tokens of the call under way.
        weight_too: False where something else has put the weight in place.
        shared: quantized inputs that other linears of the model may have made already; None shares nothing.
        originals: where the original weight is meanwhile; None keeps it in host memory.
    """
    plan = plan.to(linear.weight.device)
    with contextlib.ExitStack() as stack:
        if weight_too and (plan.weight is not None or plan.transform is not None):
            stack.enter_context(replaced(linear, plan.new_weight(values(linear.weight)), originals))
        plan = dataclasses.replace(plan, weight=None)  # what it was made of may be as large as the weight
        if plan.changes_input:
            stack.callback(linear.register_forward_pre_hook(_input_hook(plan, tokens, shared)).remove)
        if plan.transform is not None and (output := plan.transform.output) is not None:
            hook = linear.register_forward_hook(lambda _module, _args, y: output(y).to(y.dtype))
            stack.callback(hook.remove)
        yield


@contextlib.contextmanager
def installed_all(
    linears: Mapping[str, nn.Linear], plan: LinearPlan, tokens: TokenContext = lambda: None
) -> Iterator[None]:
    """Install one plan on several linears, for a trial."""
    shared = SharedInputs()
    with contextlib.ExitStack() as stack:
        for linear in linears.values():
            stack.enter_context(installed(linear, plan, tokens, shared=shared))
        yield


def _input_hook(plan: LinearPlan, tokens: TokenContext, shared: SharedInputs | None) -> Any:
    format: Format | None = None  # the one under which the input can be shared
    if isinstance(plan.activation, Format) and not plan.activation.spans_tokens and plan.transform is None:
        format = plan.activation

    def quantize(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        if shared is None or format is None:
            return plan.new_input(x, tokens()), *args[1:]
        return shared.quantized(x, format, module, lambda: plan.new_input(x, tokens())), *args[1:]

    return quantize


_ORIGINALS: WeakKeyDictionary[nn.Linear, Callable[[], Tensor]] = WeakKeyDictionary()
"""What reads the full-precision weights of linears that have another one now."""


def full_weight(linear: nn.Linear) -> Tensor:
    """The linear's weight in full precision, whatever it is replaced by at the moment; it may lie in host memory."""
    read = _ORIGINALS.get(linear)
    return values(linear.weight) if read is None else read().detach()


@contextlib.contextmanager
def replaced(linear: nn.Linear, weight: Tensor, originals: Originals | None = None) -> Iterator[None]:
    """Give the linear another weight while the context is open.

    Args:
        linear: the layer.
        weight: the other weight.
        originals: where the original weight is meanwhile; None keeps it in host memory.
    """
    original, outer = linear.weight, linear in _ORIGINALS
    waiting = originals.set_aside(original) if originals else in_host_memory(original)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    del weight
    _ORIGINALS.setdefault(linear, waiting.read)
    try:
        yield
    finally:
        linear.weight = original
        waiting.restore()
        if not outer:
            del _ORIGINALS[linear]
