"""One block of a model in calibration: run on all samples, with inputs in host memory and its linears observed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from qapbench.methods.plans import Tokens
from qapbench.models.layers import attention_rows, device_of

from .capturing import Reached, catching, observed
from .observers import Observer
from .passes import Pass, first
from .spill import Spill

T = TypeVar("T", bound=Observer)


@dataclass(frozen=True)
class Group:
    """Linears of a block that read the same input, such as query, key and value, or gate and up.

    Attributes:
        linears: the linears, by their name in the model.
        norm: name of the norm whose output they read; None if it is not the output of a norm.
        module: name of the smallest module that contains all of them; the linear itself if there is only one.
    """

    linears: Mapping[str, nn.Linear]
    norm: str | None
    module: str


@dataclass
class Block:
    """A module of the model with its inputs for every sample.

    Attributes:
        name: the module's name in the model; "" for the model itself.
        module: the module.
        linears: the linears in scope inside the module, by their name in the model.
        passes: one call per sample. Samples that never reach the module have none.
        current: a list with one entry, what is known of the tokens of the call in progress. Installed plans read it.
        spill: where the block's outputs and the inputs of modules inside it are kept.
    """

    name: str
    module: nn.Module
    linears: Mapping[str, nn.Linear]
    passes: list[Pass]
    current: list[Tokens | None] = field(default_factory=lambda: [None], repr=False)
    spill: Spill = field(default_factory=Spill, repr=False)

    def observe(self, make: Callable[[nn.Linear], T]) -> dict[str, T]:
        """Run the block on all samples and observe the inputs of its linears.

        Args:
            make: creates the observer of a linear.

        Returns:
            The observer of each linear. A linear that was never called has none.
        """
        with observed(self.linears, make) as (observers, at):
            for one in self.passes:
                at[0] = one
                self.run(one)
        return observers

    def attention_received(self) -> list[Tensor] | None:
        """How much attention each token receives in the block, summed over queries and averaged over heads.

        Returns:
            For each pass [T] float32, for tokens without padding; None if the block is no decoder layer.
        """
        attention: Any = getattr(self.module, "self_attn", None)
        if not all(hasattr(attention, name) for name in ("q_proj", "k_proj", "head_dim", "scaling")):
            return None
        found: list[Tensor] = []
        for one in self.passes:
            if (rotary := one.kwargs.get("position_embeddings")) is None:
                return None
            seen: dict[str, Tensor] = {}

            def keep(name: str, seen: dict[str, Tensor] = seen) -> Any:
                return lambda module, args, output: seen.__setitem__(name, output.flatten(0, -2))

            with contextlib.ExitStack() as stack:
                for name in ("q_proj", "k_proj"):
                    stack.callback(getattr(attention, name).register_forward_hook(keep(name)).remove)
                self.run(one)
            valid = one.masks(seen["q_proj"])[1]
            turns = [part.to(valid.device).flatten(0, -2)[valid] for part in rotary]
            places = torch.arange(int(valid.sum()), device=valid.device)
            visible = visible_places(one.kwargs.get("attention_mask"), valid)
            states = seen["q_proj"][valid], seen["k_proj"][valid]
            rows = attention_rows(attention, *states, (turns[0], turns[1]), places, visible)
            found.append(rows.sum(dim=0))
        return found

    def outputs(self) -> Iterator[Tensor]:
        """Run the block on one sample after another and yield its outputs, on its device."""
        for one in self.passes:
            yield self.run(one)

    @torch.no_grad()
    def run(self, one: Pass) -> Tensor:
        """Output of the block for one sample, without gradients."""
        return self.forward(one)

    def forward(
        self,
        one: Pass,
        weights: Mapping[str, Tensor] | None = None,
        inputs: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """Output of the block for one sample. Gradients flow if they are enabled.

        Args:
            one: the block's call for the sample.
            weights: weights to use in place of those of linears, by the linears' name in the model.
            inputs: what makes of a linear's input the one that it gets, by the linear's name in the model.
        """
        self.current[0] = one.tokens
        device = device_of(self.module)
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(device), (one.args, one.kwargs))
        prefix = f"{self.name}." if self.name else ""
        replaced = {f"{name.removeprefix(prefix)}.weight": weight for name, weight in (weights or {}).items()}
        with contextlib.ExitStack() as stack:
            for name, change in (inputs or {}).items():
                stack.callback(self.linears[name].register_forward_pre_hook(_changed_by(change)).remove)
            if not replaced:
                return first(self.module(*args, **kwargs))
            return first(functional_call(self.module, replaced, args, kwargs))

    def off(self, index: int, output: Tensor, wanted: Tensor) -> Tensor:
        """Squared differences of an output of the block from the one wanted, at tokens that are not padding.

        Args:
            index: index of the pass.
            output: what the block gave, [B, L, D].
            wanted: what it should give, of the same shape.

        Returns:
            [B, L, D], or [T, D] for the T tokens that are no padding, in float32.
        """
        off = (output.float() - wanted.to(output.device).float()).square()
        tokens = self.passes[index].tokens
        return off if tokens is None else off[tokens.valid.to(off.device)]

    def advance(self, following: list[Pass]) -> list[Pass]:
        """Run the block and set its outputs as hidden states of `following`, the calls of the next block."""
        for index, (call, output) in enumerate(zip(following, self.outputs(), strict=True)):
            following[index] = call.fed(self.spill.keep(output))
        return following

    def inside(self, name: str) -> Block:
        """A module inside this block as a block of its own. Its inputs are captured by running this block.

        Args:
            name: the module's name in the model.
        """
        if name == self.name:
            return self
        module = self.module.get_submodule(name.removeprefix(f"{self.name}.") if self.name else name)
        found: list[Pass] = []
        for one in self.passes:
            with contextlib.suppress(Reached), catching([module], module, self.spill) as caught:
                self.run(one)
            found += [replace(one, args=call.args, kwargs=call.kwargs, added=None) for call in caught[0]]
        members = {key: linear for key, linear in self.linears.items() if f"{key}.".startswith(f"{name}.")}
        return Block(name, module, members, found, self.current, self.spill)

    def groups(self) -> list[Group]:
        """Group the linears by the input that they read, in order of execution.

        One sample is run to find out; names do not matter.
        """
        inputs: dict[int, list[str]] = {}
        norms: dict[int, str] = {}
        alive: list[Tensor] = []  # kept alive, because the id of a freed tensor may be given to another

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


def _changed_by(change: Callable[[Tensor], Tensor]) -> Any:
    """A hook that changes a module's first input, and leaves its dtype."""
    return lambda module, args: (change(args[0]).to(args[0].dtype), *args[1:])


def _holder(names: list[str]) -> str:
    """Name of the smallest module that contains all of these."""
    if len(names) == 1:
        return names[0]
    shared = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def visible_places(mask: Tensor | None, valid: Tensor) -> Tensor | None:
    """What a layer's attention mask lets the valid tokens of a sample see: [T, T] bool; None if it only says causal.

    Args:
        mask: the mask, [1, 1, L, L] if it is one of queries and keys.
        valid: [L] bool, False at padding.
    """
    if mask is None or mask.ndim != 4 or mask.shape[:2] != (1, 1):
        return None
    square = mask[0, 0].to(valid.device)
    return (square if square.dtype == torch.bool else square >= 0)[valid][:, valid]
