"""`Calibration`: runs samples through a model and lets a method observe blocks, inputs and gradients."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qapbench.errors import UserError
from qapbench.memory import page_out, peak_memory
from qapbench.methods.plans import LinearPlan, Tokens
from qapbench.models import Family
from qapbench.models.layers import device_of
from qapbench.models.unread import present
from qapbench.quantize.calibration import store
from qapbench.quantize.call_tokens import UNLABELLED, tokens_of
from qapbench.quantize.install import SharedInputs, installed
from qapbench.quantize.originals import Originals
from qapbench.quantize.receipts import CalibrationUse

from .blocks import Block
from .capturing import Reached, catching, observed
from .gradients import Gradient, OutputGradients
from .observers import Observer
from .passes import Pass, first
from .samples import CalibrationResult, CalibrationSamples
from .spill import Spill

T = TypeVar("T", bound=Observer)
ORDER = ("vision", "projector", "language")
"""The parts of a model in the order in which a sample passes through them."""


@dataclass(frozen=True)
class BlockWork:
    """What a method does block by block, as it asks `Calibration.block_by_block` for it.

    Attributes:
        linears: the linears in scope, by their name in the model.
        find: computes the result for the linears of one block.
        install: makes a linear's plan from its result; None leaves the model in full precision.
        own: names of the linears whose result counts; None for all.
        whole: whether the method needs the result of all linears, those that get other formats too.
    """

    linears: Mapping[str, nn.Linear]
    find: Callable[[Block], CalibrationResult]
    install: Callable[[dict[str, Tensor]], LinearPlan] | None = None
    own: Collection[str] | None = None
    whole: bool = False


class Calibration:
    """Runs samples through a model for a calibrating method.

    After each of its methods, the model is exactly as it was before.

    Args:
        model: the loaded model.
        source: the samples, with what is needed to run them and to keep the result.
        family: family of the model; None treats the model as a single block.
        shorten: makes a pruned sample from a sample; None calibrates on all visual tokens.
        originals: where original weights are while calibrated ones are in their place; None keeps them in host memory.

    Attributes:
        used: description of the calibration for the receipt; None before `cached` ran.
    """

    def __init__(
        self,
        model: nn.Module,
        source: CalibrationSamples,
        family: Family | None = None,
        shorten: Callable[[dict[str, Any], Any], dict[str, Any]] | None = None,
        originals: Originals | None = None,
    ) -> None:
        self.model = model
        self.originals = originals
        self.source = source
        self.family = family
        self.shorten = shorten
        self.device, self.dtype = device_of(model), next(model.parameters()).dtype
        self.used: CalibrationUse | None = None
        self._current: list[Tokens | None] = [None]
        self._activations, self._results = Spill(), Spill()

    @classmethod
    def over(cls, model: nn.Module, given: Any, method: str) -> Calibration:
        """Wrap what `PTQ.prepare` was given as `calibration`.

        Args:
            model: the loaded model.
            given: a `Calibration`, `CalibrationSamples`, or a sequence of samples.
            method: name of the method, for messages.

        Raises:
            UserError: there are no samples.
        """
        if isinstance(given, Calibration):
            return given
        if isinstance(given, CalibrationSamples):
            return cls(model, given)
        if not given:
            raise UserError(f"quantize.method: {method} needs calibration samples; give `calibration=[...]`")
        return cls(model, CalibrationSamples(list(given)))

    def __len__(self) -> int:
        return len(self.source.samples)

    def _kept(self, found: CalibrationResult) -> CalibrationResult:
        """The tensors of a result in host memory, or in files where there are too many of them."""
        kept: dict[int, Tensor] = {}  # linears may share a tensor

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in kept:
                kept[id(tensor)] = self._results.keep(tensor, later=True)
            return kept[id(tensor)]

        return {linear: {name: once(tensor) for name, tensor in named.items()} for linear, named in found.items()}

    def _told(self) -> Tokens | None:
        """What is known of the tokens of the call in progress."""
        return self._current[0]

    # -- observation --

    def observe(self, linears: Mapping[str, nn.Linear], make: Callable[[nn.Linear], T]) -> dict[str, T]:
        """Run every sample through the whole model once and observe the inputs of linears.

        Args:
            linears: the linears, by their name in the model.
            make: creates the observer of a linear.

        Returns:
            The observer of each linear. A linear that no sample reaches has none.
        """
        language = {name: linear for name, linear in linears.items() if self._is_language(linear)}
        visual = {name: linear for name, linear in linears.items() if name not in language}
        with observed(language, make) as (observers, at), observed(visual, make) as (observers_visual, at_visual):
            at_visual[0] = Pass((), {}, all_vision=True)
            for index, sample in enumerate(self.source.samples):
                inputs, tokens, _ = self.inputs(sample)
                at[0] = Pass((), {}, tokens)
                self.forward(inputs)
                self.source.report("calibrating", index + 1, len(self))
        return {**observers_visual, **observers}

    def block_by_block(
        self,
        linears: Mapping[str, nn.Linear],
        find: Callable[[Block], CalibrationResult],
        install: Callable[[dict[str, Tensor]], LinearPlan] | None = None,
        whole: bool = False,
    ) -> CalibrationResult:
        """Calibrate one block after another, in the order of a forward pass.

        The inputs of a part's first block are captured once and kept in host memory, or in temporary files where they
        take more than `spill.LIMIT` bytes. The outputs of each block then
        become the inputs of the next, so that no block runs again for the sake of later ones.

        Args:
            linears: the linears in scope, by their name in the model.
            find: computes the result for the linears of one block.
            install: makes a linear's plan from its result. The plan is installed before the next block is calibrated,
                so that it sees the errors of the quantized blocks before it. None leaves the model in full precision.
            whole: whether the method needs the result of all linears, where others of them get other formats.

        Returns:
            The results of all blocks, with tensors in host memory or in temporary files.
        """
        return self.together([BlockWork(linears, find, install, whole=whole)])[0]

    def together(self, works: Sequence[BlockWork]) -> list[CalibrationResult]:
        """Do several works block by block, each on the outputs of what all of them have made of the blocks before.

        Args:
            works: the works. Each plans linears that no other does.

        Returns:
            The result of each, as `block_by_block` has it.
        """
        ahead = {name: linear for work in works for name, linear in work.linears.items()}
        chains = self._chains(ahead)
        total, done = sum(map(len, chains)), 0
        results: list[CalibrationResult] = [{} for _ in works]
        shared = SharedInputs()
        with contextlib.ExitStack() as stack:
            for chain in chains:
                captured = self._capture([module for _, module, _ in chain])
                passes = captured[0]
                for index, (name, module, members) in enumerate(chain):
                    block = Block(name, module, members, passes, self._current, self._activations)
                    with present(members.values()):
                        mine = self._found_in(block, works, ahead)
                    for result, found in zip(results, mine, strict=True):
                        result |= found
                    with contextlib.ExitStack() as calibrated:
                        for work, result in zip(works, results, strict=True):
                            for linear in [one for one in members if one in result] if work.install else ():
                                plan = work.install(result[linear])  # type: ignore[misc]
                                put = installed(
                                    members[linear], plan, self._told, shared=shared, originals=self.originals
                                )
                                calibrated.enter_context(put)
                        if index + 1 < len(chain):
                            with present(members.values()):
                                passes = block.advance(captured[index + 1])
                        if chain is not chains[-1]:  # later chains are captured behind this block
                            stack.push(calibrated.pop_all())
                    for tensor in (one for result in mine for found in result.values() for one in found.values()):
                        page_out(tensor)  # read again when everything is calibrated
                    ahead = {name: linear for name, linear in ahead.items() if name not in members}
                    done += 1
                    self.source.report("calibrating, block", done, total)
        return results

    def _found_in(self, block: Block, works: Sequence[BlockWork], ahead: Collection[str]) -> list[CalibrationResult]:
        """What each work finds in a block, before anything of it is installed.

        A work goes on as long as linears of its own are in the block or ahead of it, since it may follow the blocks.

        Args:
            block: the block.
            works: the works.
            ahead: names of the linears in this block and in those behind it.
        """
        found: list[CalibrationResult] = []
        for work in works:
            if work.own is not None and not any(name in work.own for name in ahead):
                found.append({})
                continue
            members = {name: linear for name, linear in block.linears.items() if name in work.linears}
            mine = work.find(replace(block, linears=members)) if block.passes and members else {}
            found.append(self._kept({name: mine[name] for name in mine if work.own is None or name in work.own}))
        return found

    def gradients(self, modules: Iterable[str]) -> dict[str, Gradient]:
        """Measure how strongly the loss of the labelled tokens depends on the output of each module.

        This takes one backward pass per sample. Gradients are averaged over the tokens and channels of each sample,
        then over samples.

        Args:
            modules: names of modules in the model.

        Raises:
            UserError: a sample has no `labels`.
        """
        with OutputGradients(self.model, modules) as watched:
            for index, sample in enumerate(self.source.samples):
                if "labels" not in sample:
                    raise UserError("calibration: this method needs samples with `labels` (the answers' token ids)")
                inputs, tokens, labels = self.inputs(sample)
                watched.add(inputs, tokens, labels)
                self.source.report("calibrating, gradients", index + 1, len(self))
        return watched.means()

    def last_states(self) -> list[Tensor]:
        """Hidden states [T, D] behind the last decoder layer for every sample, without padding, in host memory.

        Raises:
            ValueError: the model has no family that says which layer that is.
        """
        if self.family is None:
            raise ValueError("a model without a family has no decoder layers that are known")
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found.append(first(output).detach().flatten(0, -2))

        states: list[Tensor] = []
        handle = self.family.blocks("language")[-1].register_forward_hook(keep)
        try:
            for index, sample in enumerate(self.source.samples):
                inputs, tokens, _ = self.inputs(sample)
                found.clear()
                self.forward(inputs)
                valid = None if tokens is None else tokens.valid.flatten().to(found[-1].device)
                states.append((found[-1] if valid is None else found[-1][valid]).cpu())
                self.source.report("measuring layers", index + 1, len(self))
        finally:
            handle.remove()
        return states

    # -- cached results --

    def cached(
        self, about: Callable[[], Mapping[str, Any]], make: Callable[[], CalibrationResult]
    ) -> CalibrationResult:
        """Return the cached result for the same content, or compute and cache it. Sets `used`.

        Args:
            about: returns what the result depends on besides samples, model and pruning. Called only if there is a
                cache.
            make: computes the result.
        """
        started = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        cache, key = self.source.cache, None
        if cache is not None:
            key = store.key(
                {**about(), "samples": self.source.digest(), "fingerprints": dict(self.source.fingerprints)}
            )
        found, why = store.read(cache, key) if cache is not None and key else (None, "")
        reused = found is not None
        if found is None:
            found = make()
            if cache is not None and key:
                store.write(cache, key, found)
        self.used = CalibrationUse(
            samples=len(self),
            origin=self.source.origin,
            reused=reused,
            key=key,
            seconds=round(time.perf_counter() - started, 3),
            made_again=why or None,
            **peak_memory(self.device),
        )
        return found

    # -- the model --

    def inputs(self, sample: Any) -> tuple[Any, Tokens | None, Any]:
        """Put a sample on the model's device, pruned if `shorten` is set.

        Returns:
            (its inputs without labels, what is known of its tokens, its labels or None).
        """
        if not isinstance(sample, Mapping):
            return self._placed(sample), None, None
        inputs = {key: self._placed(value) for key, value in sample.items()}
        text = inputs.pop("relevance_text", None)
        if self.shorten is not None and self.family is not None and inputs.get(self.family.image_inputs[0]) is not None:
            with torch.no_grad():
                inputs = self.shorten(inputs, text)  # reads the labels: the answer has no say in what is kept
        labels = inputs.pop("labels", None)
        return inputs, tokens_of(inputs, self.family.image_token) if self.family else None, labels

    def _placed(self, value: Any) -> Any:
        """Move a tensor to the model's device, and floating point values to its dtype.

        Other values are returned as they are.
        """
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)

    @torch.no_grad()
    def forward(self, inputs: Any) -> None:
        """Run the model without a KV cache and with the logits of the last token only, if its family is known."""
        if not isinstance(inputs, Mapping):
            self.model(inputs)
        elif self.family is None:
            self.model(**inputs)
        else:
            self.model(**inputs, use_cache=False, logits_to_keep=1)

    def _capture(self, chain: list[nn.Module]) -> list[list[Pass]]:
        """Capture the calls of every block of a chain.

        Those after the first lack hidden states, which the block before supplies later.
        """
        language = self._is_language(chain[0])
        # Capture of the other parts ends where the language model begins.
        stop = chain[-1] if language or self.family is None else self.family.blocks("language")[0]
        passes: list[list[Pass]] = [[] for _ in chain]
        for index, sample in enumerate(self.source.samples):
            tokens: Tokens | None = None
            labels: Tensor | None = None
            with contextlib.suppress(Reached), catching(chain, stop, self._activations, language) as caught:
                inputs, tokens, labels = self.inputs(sample)  # pruning runs the vision tower: its calls are caught too
                self.forward(inputs)
            labelled = labels != UNLABELLED if labels is not None and language else None
            for one, calls in zip(passes, caught, strict=True):
                for call in calls:
                    told = tokens if language else None
                    one.append(replace(call, tokens=told, all_vision=not language, labelled=labelled))
            self.source.report("calibrating, inputs", index + 1, len(self))
        return passes

    def _is_language(self, module: nn.Module) -> bool:
        """Whether the module's tokens are those of the prompt. Without a family all of them count as text."""
        return self.family is None or any(module is inner for inner in self.family.parts["language"].modules())

    def _chains(self, linears: Mapping[str, nn.Linear]) -> list[list[tuple[str, nn.Module, dict[str, nn.Linear]]]]:
        """The blocks of each part, in order, each with its name, its module and its linears in scope.

        Blocks after the last one with such linears are left out. Linears of a part that are in none of its blocks form
        a chain of their own, whose only block is the whole part.
        """
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
            chains += [chain] if chain else []
            for module in self.family.roots(part):
                root = names[id(module)]
                rest = {key: left.pop(key) for key in list(left) if key.startswith(f"{root}.")}
                chains += [[(root, module, rest)]] if rest else []
        return chains
