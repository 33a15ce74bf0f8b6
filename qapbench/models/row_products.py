"""Row-by-row computation, so that no bit of a row depends on the other rows of its batch.

A BLAS chooses its kernel, and a vectorised loop its remainder, by the size of the input. The last bit of a result
follows that choice, and a 4-bit level may follow the last bit. Matrix products and activation functions are therefore
computed on one row [1, L, D] after the other. All other operations of a transformer are elementwise or reduce a single
token, so they stay batched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .unread import UnreadWeight, row_blocks

CACHED = 2**20  # number of values of a tensor that stay in a CPU's cache until they are used again
VECTORS = 64  # values by which vectorised loops advance at most (two vectors of 512 bits, of 16-bit values)
UNSPLIT = 2**15  # values up to which torch gives an elementwise loop to one thread
SHORT = 128  # tokens of a row up to which reading a large weight costs more than multiplying by it


@contextlib.contextmanager
def row_by_row(modules: Iterable[nn.Module], rows: int) -> Iterator[None]:
    """While the context is open, compute the linears and activation functions among some modules row by row.

    A large weight on a CPU is applied to short rows in blocks, even if there is only one row, so that a row has the
    same bits alone and in a batch.

    Args:
        modules: the modules of a model.
        rows: number of rows in the batch.
    """
    with contextlib.ExitStack() as stack:
        for module in modules:
            plain = isinstance(module, nn.Linear) and _is_plain(module)
            large = plain and module.weight.device.type == "cpu" and module.weight.numel() > CACHED
            if large or (rows > 1 and (isinstance(module, nn.Linear) or _is_activation(module))):
                stack.enter_context(_apart(module, plain, large))
        yield


def _is_plain(linear: nn.Module) -> bool:
    """Whether the linear computes x @ weight.T + bias. A weight of integers, for example, has a product of its own."""
    own = type(linear).forward is nn.Linear.forward
    if "forward" in linear.__dict__:  # that of a hook of accelerate's, which moves the input and calls the linear's own
        own &= hasattr(linear, "_hf_hook") and getattr(linear._old_forward, "__func__", None) is nn.Linear.forward
    return own and type(linear.weight) in (nn.Parameter, UnreadWeight)


def _is_activation(module: nn.Module) -> bool:
    home = type(module).__module__
    return home.startswith(("torch.nn.modules.activation", "transformers.activations"))


@contextlib.contextmanager
def _apart(module: Any, plain: bool, large: bool) -> Iterator[None]:
    """While the context is open, run a module on one row at a time.

    Args:
        module: a linear or an activation function.
        plain: whether it is a linear that computes x @ weight.T + bias.
        large: whether its weight is on a CPU and exceeds the cache.
    """
    inner = module.forward

    def forward(x: Tensor) -> Tensor:
        walks = large and x.ndim == 3 and x.shape[1] <= SHORT
        if not walks and (x.ndim < 3 or len(x) == 1):
            return inner(x)
        if plain and x.ndim == 3:
            return _products(x.to(module.weight.device), module.weight, module.bias, walks)
        if not isinstance(module, nn.Linear) and _is_uniform(x):
            return inner(x)
        return torch.cat([inner(row) for row in x.split(1)])

    with computing(module, forward):
        yield


def _is_uniform(x: Tensor) -> bool:
    """Whether an elementwise loop over x [B, ...] treats every value alike, so that rows may stay side by side.

    It does on a CPU if it is not split among threads and leaves no remainder to be computed one by one.
    """
    rows_are_whole = x[0].numel() % VECTORS == 0
    return x.device.type == "cpu" and x.is_contiguous() and rows_are_whole and x.numel() <= UNSPLIT


@contextlib.contextmanager
def computing(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """While the context is open, a module computes something else, and its hooks still run."""
    held = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if held is None:
            del module.forward
        else:
            module.forward = held


def _products(x: Tensor, weight: Tensor, bias: Any, in_blocks: bool) -> Tensor:
    """The linear of x [B, L, in], one row after the other.

    Args:
        x: the input.
        weight: [out, in].
        bias: [out], or None.
        in_blocks: whether to take the weight in blocks, each for all rows while it is in the cache. The blocks do not
            depend on the batch, so no bit does.
    """
    out = x.new_empty(*x.shape[:2], len(weight))
    step = max(64, CACHED // weight.shape[1] // 64 * 64) if in_blocks else len(weight)
    for block, some in row_blocks(weight, step):
        part, added = some.T, None if bias is None else bias[block]
        for row, target in zip(x, out[..., block], strict=True):
            if added is None:
                torch.mm(row, part, out=target)
            else:
                torch.addmm(added, row, part, out=target)
    return out
