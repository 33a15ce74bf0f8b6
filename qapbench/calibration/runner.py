"""`Calibration`: a model, its samples, and the ways in which a method may look at both."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qapbench.errors import UserError
from qapbench.install import installed, tokens_of
from qapbench.memory import peak_memory
from qapbench.models import Family
from qapbench.quantization import LinearPlan, Tokens

from . import store
from .blocks import Block, Pass, Reached, catching, device_of, first, observed
from .observers import Observer
from .samples import CalibrationSamples, Found

T = TypeVar("T", bound=Observer)
IGNORED_LABEL = -100
ORDER = ("vision", "projector", "language")
"""The parts in the order in which a sample passes them."""


@dataclass(frozen=True)
class Gradient:
    """Mean |d loss / d output| of a module, over the tokens of each kind; NaN where there were none.

    Attributes:
        vision: over visual tokens; text: over all others; answer: over those that carry a label.
    """

    vision: float
    text: float
    answer: float


class Calibration:
    """Runs samples through a model for a method that needs to see what happens there.

    The model is as before, to the bit, after each of its methods.

    Args:
        family: the model seen through its family; without one the model is a single block.
        shorten: makes a pruned sample of a sample; None calibrates on all visual tokens.
    """

    def __init__(
        self, model: nn.Module, source: CalibrationSamples, family: Family | None = None,
        shorten: Callable[[dict[str, Any], Any], dict[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.source = source
        self.family = family
        self.shorten = shorten
        self.device, self.dtype = device_of(model), next(model.parameters()).dtype
        self.used: dict[str, Any] = {}
        self._current: list[Tokens | None] = [None]

    @classmethod
    def over(cls, model: nn.Module, given: Any, method: str) -> Calibration:
        """What `prepare` was given, as a Calibration: it may be one already, or a sequence of samples."""
        if isinstance(given, Calibration):
            return given
        if isinstance(given, CalibrationSamples):
            return cls(model, given)
        if not given:
            raise UserError(f"quantize.method: {method} needs calibration samples; give `calibration=[...]`")
        return cls(model, CalibrationSamples(list(given)))

    def __len__(self) -> int:
        return len(self.source.samples)

    # -- ways to look --

    def observe(self, linears: Mapping[str, nn.Linear], make: Callable[[nn.Linear], T]) -> dict[str, T]:
        """One pass of every sample through the whole model; `make` gives each linear its observer.

        A linear that no sample reaches has none.
        """
        language = {name: linear for name, linear in linears.items() if self._is_language(linear)}
        visual = {name: linear for name, linear in linears.items() if name not in language}
        with observed(language, make) as (seen, at), observed(visual, make) as (seen_visual, at_visual):
            at_visual[0] = Pass((), {}, all_vision=True)
            for index, sample in enumerate(self.source.samples):
                inputs, tokens = self._inputs(sample)
                at[0] = Pass((), {}, tokens)
                self._forward(inputs)
                self.source.report("calibrating", index + 1, len(self))
        return {**seen_visual, **seen}

    def block_by_block(
        self, linears: Mapping[str, nn.Linear], find: Callable[[Block], Found],
        install: Callable[[dict[str, Tensor]], LinearPlan] | None = None,
    ) -> Found:  # fmt: skip
        """Blocks one after another, in the order of a forward pass.

        The inputs of a part's first block are captured once and kept in host memory; each block's outputs then take
        their place, so that nothing runs twice and one block at a time is on its device.

        Args:
            find: what is to be known of each linear of a block.
            install: the plan of a linear, from what was found: the blocks behind then see the quantized ones in
                front of them. None lets them see the model as it is.
        """
        chains = self._chains(linears)
        total, done = sum(map(len, chains)), 0
        found: Found = {}
        with contextlib.ExitStack() as stack:
            for chain in chains:
                captured = self._capture([module for _, module, _ in chain])
                passes = captured[0]
                for index, (name, module, members) in enumerate(chain):
                    block = Block(name, module, members, passes, self._current)
                    mine = _in_host_memory(find(block)) if passes and members else {}
                    found |= mine
                    for linear, tensors in mine.items() if install else ():
                        plan = install(tensors)  # type: ignore[misc]
                        stack.enter_context(installed(linears[linear], plan, lambda: self._current[0]))
                    if index + 1 < len(chain):
                        passes = block.advance(captured[index + 1])
                    done += 1
                    self.source.report("calibrating, block", done, total)
        return found

    def gradients(self, modules: Iterable[str]) -> dict[str, Gradient]:
        """One backward pass a sample: how much the loss of the labelled tokens moves with each module's output.

        Samples need `labels`. Gradients are averaged over tokens and channels of each sample, then over samples.
        """
        sums: dict[str, list[list[float]]] = {name: [[], [], []] for name in modules}
        masks: list[Tensor] = []

        def watch(name: str) -> Any:
            def note(gradient: Tensor) -> None:
                size = gradient.detach().float().abs().mean(dim=-1).flatten()
                for values, mask in zip(sums[name], masks, strict=True):
                    if mask.any():
                        values.append(float(size[mask].mean()))

            def hook(module: nn.Module, args: Any, output: Any) -> None:
                first(output).register_hook(note)

            return hook

        leaf: list[Tensor] = []

        def begin(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            leaf[:] = [output.detach().requires_grad_(True)]
            return leaf[0]

        with contextlib.ExitStack() as stack:
            # The weights need no gradient: the graph begins at the embeddings.
            embeddings: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
            stack.callback(embeddings.register_forward_hook(begin).remove)
            for name in sums:
                stack.callback(self.model.get_submodule(name).register_forward_hook(watch(name)).remove)
            for index, sample in enumerate(self.source.samples):
                if "labels" not in sample:
                    raise UserError("calibration: this method needs samples with `labels` (the answers' token ids)")
                inputs, tokens = self._inputs(sample, labels=True)
                answer = (inputs["labels"] != IGNORED_LABEL).flatten()
                vision = torch.zeros_like(answer) if tokens is None else tokens.vision.flatten()
                masks[:] = [vision, ~vision, answer]
                with torch.enable_grad():
                    loss = self.model(**inputs, use_cache=False).loss
                    torch.autograd.grad(loss, leaf)  # runs the hooks; nothing accumulates in a parameter
                self.source.report("calibrating, gradients", index + 1, len(self))
        return {
            name: Gradient(*(sum(v) / len(v) if v else float("nan") for v in kinds)) for name, kinds in sums.items()
        }

    # -- kept results --

    def recall(self, about: Mapping[str, Any], make: Callable[[], Found]) -> Found:
        """What `make` finds, or what it found for the same content before.

        Args:
            about: whatever the result depends on besides samples, model and pruning.
        """
        started = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        cache, key = self.source.cache, None
        if cache is not None:
            key = store.key({**about, "samples": self.source.digest(), "fingerprints": dict(self.source.fingerprints)})
        found, why = store.read(cache, key) if cache is not None and key else (None, "")
        reused = found is not None
        if found is None:
            found = make()
            if cache is not None and key:
                store.write(cache, key, found)
        self.used = {
            "samples": len(self), "origin": self.source.origin, "reused": reused, "key": key,
            "seconds": round(time.perf_counter() - started, 3), **peak_memory(self.device),
        }  # fmt: skip
        if why:
            self.used["made_again"] = why
        return found

    # -- the model --

    def _inputs(self, sample: Any, labels: bool = False) -> tuple[Any, Tokens | None]:
        """A sample on the model's device, pruned where that is asked for, and what is known of its tokens."""
        if not isinstance(sample, Mapping):
            return self._placed(sample), None
        inputs = {key: self._placed(value) for key, value in sample.items()}
        text = inputs.pop("relevance_text", None)
        if not labels:
            inputs.pop("labels", None)
        if self.shorten is not None and self.family is not None and inputs.get(self.family.image_inputs[0]) is not None:
            with torch.no_grad():
                inputs = self.shorten(inputs, text)
        return inputs, tokens_of(inputs, self.family.image_token) if self.family else None

    def _placed(self, value: Any) -> Any:
        """On the model's device; numbers with a fraction in its dtype."""
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)

    @torch.no_grad()
    def _forward(self, inputs: Any) -> None:
        if not isinstance(inputs, Mapping):
            self.model(inputs)
        elif self.family is None:
            self.model(**inputs)
        else:
            self.model(**inputs, use_cache=False, logits_to_keep=1)

    def _capture(self, chain: list[nn.Module]) -> list[list[Pass]]:
        """The calls of every block of a chain; behind the first without hidden states, which come later."""
        language = self._is_language(chain[0])
        stop = chain[-1] if language else self._first_of_language()
        passes: list[list[Pass]] = [[] for _ in chain]
        for index, sample in enumerate(self.source.samples):
            tokens: Tokens | None = None
            with contextlib.suppress(Reached), catching(chain, stop) as caught:
                inputs, tokens = self._inputs(sample)  # a pruned sample runs the vision tower here
                self._forward(inputs)
            for one, calls in zip(passes, caught, strict=True):
                one += [Pass(*call, tokens if language else None, not language) for call in calls]
            self.source.report("calibrating, inputs", index + 1, len(self))
        return passes

    def _first_of_language(self) -> nn.Module | None:
        return self.family.blocks("language")[0] if self.family else None

    def _is_language(self, module: nn.Module) -> bool:
        """Whether its tokens are those of the prompt; without a family all are text."""
        return self.family is None or any(module is inner for inner in self.family.parts["language"].modules())

    def _chains(self, linears: Mapping[str, nn.Linear]) -> list[list[tuple[str, nn.Module, dict[str, nn.Linear]]]]:
        """Blocks of each part, in order, each with its linears in scope. What lies in none is a block of its own."""
        if self.family is None:
            return [[("", self.model, dict(linears))]]
        chains = []
        names = {id(module): name for name, module in self.model.named_modules()}
        parts = self.family.parts
        left = dict(linears)
        for part in sorted(parts, key=lambda part: ORDER.index(part) if part in ORDER else len(ORDER)):
            chain = []
            for module in self.family.blocks(part):
                name = names[id(module)]
                members = {key: left.pop(key) for key in list(left) if f"{key}.".startswith(f"{name}.")}
                chain.append((name, module, members))
            while chain and not chain[-1][2]:
                chain.pop()
            root = names[id(parts[part])]
            rest = {key: left.pop(key) for key in list(left) if key.startswith(f"{root}.")}
            chains += [chain] if chain else []
            chains += [[(root, parts[part], rest)]] if rest else []
        return chains


def _in_host_memory(found: Found) -> Found:
    return {linear: {name: tensor.to("cpu") for name, tensor in named.items()} for linear, named in found.items()}
