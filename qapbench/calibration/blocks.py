"""One block of a model on every sample: its inputs in host memory, its linears observed, its outputs made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from qapbench.quantization import Tokens

from .observers import Observer

T = TypeVar("T", bound=Observer)
HIDDEN = "hidden_states"


@dataclass
class Pass:
    """One sample's call of a module, its tensors in host memory.

    Attributes:
        vision: whether each token is an image's: [L] bool, or one bool for all of them.
        valid: [L] bool, tokens that are no padding; None where all are.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tokens: Tokens | None = None
    all_vision: bool = False

    def fed(self, hidden: Tensor) -> Pass:
        """The same call with other hidden states."""
        if self.args:
            return replace(self, args=(hidden, *self.args[1:]))
        return replace(self, kwargs={**self.kwargs, HIDDEN: hidden})

    def masks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(vision, valid), both [T] bool, for an input x [..., in] whose T tokens lie in front."""
        shape = x.shape[:-1]
        if self.tokens is not None and self.tokens.vision.shape == shape:
            return self.tokens.vision.flatten().to(x.device), self.tokens.valid.flatten().to(x.device)
        every = torch.ones(shape, dtype=torch.bool, device=x.device).flatten()
        return (every if self.all_vision else ~every), every


@dataclass(frozen=True)
class Group:
    """Linears of a block that read one and the same input (query, key and value; gate and up).

    Attributes:
        norm: name of the norm whose output that is; None where it is something else's.
        module: name of the smallest module that holds them all: the linear itself where it is alone.
    """

    linears: Mapping[str, nn.Linear]
    norm: str | None
    module: str


@dataclass
class Block:
    """A module with the inputs of every sample.

    Attributes:
        name: in the model; linears: those in scope inside it.
        passes: one a sample; samples that never reach the block have none.
    """

    name: str
    module: nn.Module
    linears: Mapping[str, nn.Linear]
    passes: list[Pass]
    current: list[Tokens | None] = field(default_factory=lambda: [None], repr=False)

    def observe(self, make: Callable[[nn.Linear], T]) -> dict[str, T]:
        """One pass over all samples; `make` gives each linear its observer. A linear that is never called has none."""
        with observed(self.linears, make) as (seen, at):
            for one in self.passes:
                at[0] = one
                self.run(one)
        return seen

    def outputs(self) -> Iterator[Tensor]:
        """What the block answers, sample by sample, on its device."""
        for one in self.passes:
            yield self.run(one)

    @torch.no_grad()
    def run(self, one: Pass) -> Tensor:
        return self.forward(one)

    def forward(self, one: Pass, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """What the block answers to one sample; gradients flow where they are enabled.

        Args:
            weights: stand in for those of linears, by name in the model.
        """
        self.current[0] = one.tokens
        device = device_of(self.module)
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(device), (one.args, one.kwargs))
        prefix = f"{self.name}." if self.name else ""
        replaced = {f"{name.removeprefix(prefix)}.weight": weight for name, weight in (weights or {}).items()}
        return first(functional_call(self.module, replaced, args, kwargs) if replaced else self.module(*args, **kwargs))

    def advance(self, following: list[Pass]) -> list[Pass]:
        """The calls of the block behind, with this one's outputs as their hidden states."""
        for index, (call, output) in enumerate(zip(following, self.outputs(), strict=True)):
            following[index] = call.fed(output.to("cpu"))
        return following

    def inside(self, name: str) -> Block:
        """A module of this block, with what reaches it."""
        if name == self.name:
            return self
        module = self.module.get_submodule(name.removeprefix(f"{self.name}.") if self.name else name)
        found: list[Pass] = []
        for one in self.passes:
            with contextlib.suppress(Reached), catching([module], module) as caught:
                self.run(one)
            found += [Pass(*call, one.tokens, one.all_vision) for call in caught[0]]
        members = {key: linear for key, linear in self.linears.items() if f"{key}.".startswith(f"{name}.")}
        return Block(name, module, members, found, self.current)

    def groups(self) -> list[Group]:
        """The linears by what they read, in the order of execution. Found by running one sample, not by name."""
        inputs: dict[int, list[str]] = {}
        norms: dict[int, str] = {}
        alive: list[Tensor] = []  # or a freed tensor's id would be given to another

        def reads(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                alive.append(args[0])
                inputs.setdefault(id(args[0]), []).append(name)

            return hook

        def norm(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                alive.append(first(output))
                norms[id(first(output))] = name

            return hook

        handles = [linear.register_forward_pre_hook(reads(name)) for name, linear in self.linears.items()]
        for path, module in self.module.named_modules():
            if "norm" in type(module).__name__.lower():
                handles.append(module.register_forward_hook(norm(".".join(filter(None, (self.name, path))))))
        try:
            if self.passes:
                self.run(self.passes[0])
        finally:
            for handle in handles:
                handle.remove()
        return [
            Group({name: self.linears[name] for name in names}, norms.get(key), _holder(names))
            for key, names in inputs.items()
        ]


def _holder(names: list[str]) -> str:
    """The smallest module that holds all of these."""
    if len(names) == 1:
        return names[0]
    shared = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


class Reached(Exception):
    """The module that was waited for is being called. It ends a forward pass that has gone far enough."""


@contextlib.contextmanager
def catching(chain: Sequence[nn.Module], stop: nn.Module | None) -> Iterator[list[list[tuple[Any, dict[str, Any]]]]]:
    """The calls of modules during one forward pass, in host memory: their arguments, and what else they are told.

    Modules behind the first are told everything but their hidden states. Masks and positions differ between layers of
    some models; what they have in common is held once. The call of `stop` is recorded and raises `Reached`.
    """
    caught: list[list[tuple[Any, dict[str, Any]]]] = [[] for _ in chain]
    held: dict[int, tuple[Tensor, Tensor]] = {}  # the original stays alive, so that its id stays its own

    def offload(tensor: Tensor) -> Tensor:
        if id(tensor) not in held:
            held[id(tensor)] = (tensor, tensor.detach().to("cpu"))
        return held[id(tensor)][1]

    def catch(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index:
                args, kwargs = (None, *args[1:]) if args else (), {**kwargs}
                if not args:
                    kwargs.pop(HIDDEN, None)
            caught[index].append(tree_map_only(Tensor, offload, (args, dict(kwargs))))
            if module is stop:
                raise Reached

        return hook

    def end(module: nn.Module, args: Any) -> None:
        raise Reached

    handles = [module.register_forward_pre_hook(catch(index), with_kwargs=True) for index, module in enumerate(chain)]
    if stop is not None and not any(stop is module for module in chain):
        handles.append(stop.register_forward_pre_hook(end))
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def observed(
    linears: Mapping[str, nn.Linear], make: Callable[[nn.Linear], T]
) -> Iterator[tuple[dict[str, T], list[Pass]]]:
    """Hooks that hand every linear's input to its observer; the caller says at [0] which pass is under way."""
    seen: dict[str, T] = {}
    at: list[Pass] = [Pass((), {})]

    def hook_of(name: str, linear: nn.Linear) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in seen:
                seen[name] = make(linear)
            vision, valid = at[0].masks(args[0])
            x = args[0].detach().flatten(0, -2)
            seen[name](*((x, vision) if valid.all() else (x[valid], vision[valid])))

        return hook

    handles = [linear.register_forward_pre_hook(hook_of(name, linear)) for name, linear in linears.items()]
    try:
        yield seen, at
    finally:
        for handle in handles:
            handle.remove()


def first(output: Any) -> Tensor:
    """A module's output, or the first of several."""
    if isinstance(output, Mapping):  # a whole model's
        return next(iter(output.values()))
    return output[0] if isinstance(output, tuple) else output


def device_of(module: nn.Module) -> torch.device:
    return next(iter(module.parameters())).device
