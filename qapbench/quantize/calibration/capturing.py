"""What passes through a model in a forward pass: the calls of its modules, and the inputs of its linears."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qapbench.errors import UserError
from qapbench.methods.tokens import all_finite

from .observers import Observer
from .passes import HIDDEN, Pass, first
from .spill import Spill

T = TypeVar("T", bound=Observer)


class Reached(Exception):
    """Raised when the module waited for is called, to end a forward pass that has gone far enough."""


@contextlib.contextmanager
def catching(
    chain: Sequence[nn.Module], stop: nn.Module, spill: Spill, emptied: bool = False
) -> Iterator[list[list[Pass]]]:
    """Capture the calls of modules during one forward pass, in host memory.

    Of the first module all arguments are kept, of the others all but their hidden states. Masks and positions may
    differ between layers of a model; tensors that several calls share are stored once.

    Args:
        chain: the modules.
        stop: module whose call ends the forward pass by raising `Reached`. If it is in `chain`, its call is captured
            first.
        spill: where the tensors are kept.
        emptied: whether the modules answer with zeros, so that the next one's hidden states are what the model adds
            between the two. Where the first one returns nothing but its hidden states, the others are not computed.

    Yields:
        For each module a list of its calls.
    """
    caught: list[list[Pass]] = [[] for _ in chain]
    # Originals are held too, because the id of a freed tensor may be reused.
    held: dict[int, tuple[Tensor, Tensor]] = {}

    def offload(tensor: Tensor) -> Tensor:
        if id(tensor) not in held:
            held[id(tensor)] = (tensor, spill.keep(tensor))
        return held[id(tensor)][1]

    def catch(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs, added = dict(kwargs), None
            if index:
                hidden = args[0] if args else kwargs.pop(HIDDEN, None)
                args = (None, *args[1:]) if args else ()
                added = offload(hidden) if emptied and hidden is not None and hidden.any() else None
            held_args, held_kwargs = tree_map_only(Tensor, offload, (args, kwargs))
            caught[index].append(Pass(held_args, held_kwargs, added=added))
            if module is stop:
                raise Reached

        return hook

    def end(module: nn.Module, args: Any) -> None:
        raise Reached

    def empty(module: nn.Module, args: Any, output: Any) -> Any:
        zeros = torch.zeros_like(first(output))
        if module is chain[0] and isinstance(output, Tensor):
            for later in chain[1:]:
                skipping.enter_context(_answering_with_zeros(later))
        return (zeros, *output[1:]) if isinstance(output, tuple) else zeros

    skipping = contextlib.ExitStack()
    handles = [module.register_forward_pre_hook(catch(index), with_kwargs=True) for index, module in enumerate(chain)]
    handles += [module.register_forward_hook(empty) for module in chain if emptied]
    if not any(stop is module for module in chain):
        handles.append(stop.register_forward_pre_hook(end))
    try:
        yield caught
    finally:
        skipping.close()
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _answering_with_zeros(module: nn.Module) -> Iterator[None]:
    """While the context is open, a block computes nothing: it answers with zeros in place of hidden states."""

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros_like(args[0] if args else kwargs[HIDDEN])

    before = module.__dict__.get("forward")  # such as that of accelerate
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextlib.contextmanager
def observed(
    linears: Mapping[str, nn.Linear], make: Callable[[nn.Linear], T]
) -> Iterator[tuple[dict[str, T], list[Pass]]]:
    """Pass the inputs of linears to observers while the context is open.

    Args:
        linears: the linears, by their name in the model.
        make: creates the observer of a linear at its first call.

    Yields:
        (the observers by the name of their linear, a list whose entry 0 the caller sets to the call in progress).

    Raises:
        UserError: an input of a linear is not finite, at a token that is not padding.
    """
    observers: dict[str, T] = {}
    at: list[Pass] = [Pass((), {})]

    def hook_of(name: str, linear: nn.Linear) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in observers:
                observers[name] = make(linear)
            vision, valid = at[0].masks(args[0])
            x = args[0].detach().flatten(0, -2)
            if not valid.all():
                x, vision = x[valid], vision[valid]
            check_finite(x, f"the input of {name}")
            observers[name](x, vision)

        return hook

    handles = [linear.register_forward_pre_hook(hook_of(name, linear)) for name, linear in linears.items()]
    try:
        yield observers, at
    finally:
        for handle in handles:
            handle.remove()


def check_finite(x: Tensor, what: str) -> None:
    """Check that calibration has only numbers to work with.

    Raises:
        UserError: some values of x are NaN or infinite.
    """
    if not all_finite(x):
        bad = x.numel() - int(x.isfinite().sum())
        message = f"calibration: {what} has {bad} of {x.numel()} values that are not finite"
        raise UserError(f"{message}; try a wider dtype, or look for NaN in the checkpoint and the samples")
