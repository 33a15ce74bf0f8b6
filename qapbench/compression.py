"""`compress(model, spec)`: quantizes and prunes a supported Hugging Face model while a context is open."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .costing.budget import resolved
from .costing.known import costed_model
from .errors import UserError
from .memory import check_device
from .methods.formats import Format
from .methods.kinds import ptqs
from .methods.plans import LinearPlan, TokenActivation
from .models import Family, family_of
from .models.compressed import described
from .models.relevance import TextTower
from .models.unread import values
from .prune.build import build_pruning
from .prune.calls import PrunedCalls
from .prune.generation import option
from .prune.pruning import Pruning
from .prune.splice import PrunedImage
from .quantize import backends
from .quantize.calibration import Calibration, CalibrationSamples
from .quantize.calibration.allocating import allocated
from .quantize.call_tokens import TokenContext, nothing_known, watching
from .quantize.install import SharedInputs, installed
from .quantize.measured_bits import ROWS, measured_bits
from .quantize.originals import Keep, Originals
from .quantize.packed import Buffer, held_packed, packed_weight
from .quantize.receipts import KVUse, LinearReceipt
from .receipt import Receipt
from .spec.run_spec import PruneSpec, QuantizeSpec, RunSpec


@contextlib.contextmanager
def compress(
    model: Any,
    spec: RunSpec | Mapping[str, Any],
    processor: Any = None,
    text_tower: TextTower | str | None = None,
    calibration: Any = None,
    on_images: Callable[[list[PrunedImage]], None] | None = None,
    keep_originals: Keep | Originals = "auto",
) -> Iterator[Receipt]:
    """Quantize and prune a loaded model while the context is open. Afterwards the model is as it was, to the bit.

    Inside the context, `model(...)` and `model.generate(...)` run compressed. `generate` returns the caller's own
    prompt in front of the new tokens, so the usual `out[:, inputs.input_ids.shape[1]:]` holds. The logits of a plain
    forward pass have the length of the shortened sequence. Inputs may be batched, and padded on either side. Both calls
    accept `relevance_text=[...]`, one question per image, for pruners that compare the image with the question. If it
    is not given, they read the prompt. An answer has no say in which tokens are kept: in a call with `labels`, the
    prompt of an image ends before the first token behind it that has a label other than -100. Without `labels` the
    whole text is the prompt. What other arguments of the two calls do is listed in docs/pruners.md.

    Args:
        model: a Hugging Face model of a supported family.
        spec: a RunSpec, or a mapping with `quantize`, `prune` or both, written as in a spec file.
        processor: the model's processor, to read questions; the tokenizer in the model's folder if None.
        text_tower: CLIP checkpoint with the joint embedding space of the model's vision tower: a folder, a hub id, or a
            loaded one.
        calibration: samples for methods that calibrate: `CalibrationSamples`, or a sequence of the model's keyword
            arguments, one question each. If calibration prunes by the question, they include `relevance_text`.
        on_images: called after every pruned call with its images after pruning.
        keep_originals: where the original weights are meanwhile: in "memory", in a temporary "file", or nowhere but in
            the "checkpoint" that the model was loaded from, for weights that equal it to the bit (others go to a
            temporary file). "auto" is "memory" for a model of up to 256 MB, "checkpoint" for others.

    Yields:
        The receipt, which fills while the model runs.

    Raises:
        UserError: the spec does not fit this model, or the model is on Apple's "mps".
    """
    quantize, prune = _sections(spec)
    owner = spec.text_tower if isinstance(spec, RunSpec) else None
    family = family_of(model)
    check_device(family.model.device.type)
    _check_in_memory(family.model)
    receipt = Receipt(checkpoint=described(family.model))
    if prune and prune.budget is not None:
        prune = resolved(prune, costed_model(model, named_tower=owner), quantize)
    with contextlib.ExitStack() as stack:
        if isinstance(keep_originals, Originals):
            originals = keep_originals
        else:
            originals = Originals(family.model, keep_originals)
            stack.callback(originals.close)
        # Calibration may prune as runs do, but its prompts must not be counted in the receipt.
        pruned = build_pruning(family, prune, receipt, processor, text_tower, owner, on_images) if prune else None
        if quantize:
            aside = dataclasses.replace(pruned, receipt=Receipt(), on_images=None) if pruned else None
            stack.enter_context(_quantized(family, quantize, receipt, calibration, aside, originals))
        if pruned:
            stack.enter_context(PrunedCalls(pruned).installed())
        yield receipt


def _check_in_memory(model: nn.Module) -> None:
    """Check that every weight has values that can be quantized.

    Raises:
        UserError: one has none, as where accelerate keeps it on disk or in host memory until its layer runs.
    """
    absent = next((name for name, weight in model.named_parameters() if weight.is_meta), None)
    if absent is not None:
        helps = "load it where GPUs hold all of it (one or several), or let `qapbench run` load it (`--offload`)"
        raise UserError(f"model: {absent} is not in memory: accelerate puts it there while its layer runs; {helps}")


def _sections(spec: RunSpec | Mapping[str, Any]) -> tuple[QuantizeSpec | None, PruneSpec | None]:
    """The quantize section and the prune section of a spec, validated; None for one that is missing."""
    if isinstance(spec, RunSpec):
        return spec.quantize, spec.prune
    if unknown := set(spec) - {"quantize", "prune"}:
        raise UserError(f"spec: unknown section '{sorted(unknown)[0]}'; compress reads `quantize` and `prune`")
    filled = RunSpec.parse({**spec, "model": "given", "task": "none"})
    return filled.quantize, filled.prune


@contextlib.contextmanager
def _quantized(
    family: Family,
    spec: QuantizeSpec,
    receipt: Receipt,
    calibration: Any,
    pruned: Pruning | None,
    originals: Originals,
) -> Iterator[None]:
    """While the context is open, the model is quantized, and the receipt measures its linears.

    Args:
        family: the model.
        spec: the quantize section.
        receipt: receives one line per linear.
        calibration: calibration samples as `compress` takes them.
        pruned: pruning for calibration; None if the spec does not prune.
        originals: where the original weights are meanwhile.
    """
    receipt.quantization = str(spec.method)
    receipt.backend = backends.describe(spec.backend, family.model.device)
    linears = family.linears(spec.scope)
    parts = {name: part for part in spec.scope for name in family.linears([part])}
    for part in sorted(set(spec.scope) - set(parts.values())):
        if not linears:
            kind = family.model.config.model_type
            raise UserError(f"quantize.scope: the {part} of a {kind} has no linear layers")
        receipt.fall_back(f"{part}: left in full precision, because it has no linear layers")
    method = ptqs.create(spec.method.name, **spec.method.params)
    runner = _calibration(family, spec, calibration, pruned, originals)
    if spec.allocate and runner is not None:
        spec, receipt.allocation = allocated(family, spec, linears, runner)
    formats = spec.formats(linears)
    receipt.wants_weights, receipt.wants_activations = (any(sides) for sides in zip(*formats.values(), strict=True))
    plans = method.prepare_each(family.model, linears, formats, runner)
    if runner is not None:
        receipt.calibration = runner.used
    with contextlib.ExitStack() as stack:
        told: TokenContext = nothing_known
        if spec.kv or any(plan.needs_tokens for name, plan in plans.items() if parts[name] == "language"):
            told = stack.enter_context(watching(family.core, family.image_token))
        if spec.kv:
            from .quantize.kv_cache import quantized_cache

            receipt.kv = KVUse(format=spec.kv.label, bits_asked=spec.kv.bits)
            stack.enter_context(quantized_cache(family.parts["language"], spec.kv, told, receipt.kv))
            stack.enter_context(_reading_a_cache(family.model))
        shared, buffer = SharedInputs(), Buffer()
        for name, linear in linears.items():
            plan = plans.pop(name, None)  # what its weight is made of is free once it is made
            plan = plan.to(linear.weight.device) if plan else None
            asked = formats[name]
            if plan is None and (any(asked) or not spec.overrides):
                receipt.fall_back(f"{name}: left in full precision by {spec.method}")
            shape = (linear.out_features, linear.in_features)
            line = LinearReceipt(name=name, part=parts[name], shape=shape, planned=plan is not None)
            line.asked = asked.bits if spec.overrides else None
            receipt.linears.append(line)
            on_kernel = plan is not None and spec.backend == "torchao"
            if plan is not None and on_kernel:
                stack.enter_context(backends.int8_linear(linear, plan, line, originals))
            elif plan is not None:
                packs = spec.storage == "packed" and plan.weight is not None
                packed = packed_weight(plan, values(linear.weight), name, spec.method.name) if packs else None
                if packed is not None:
                    across = asked.weights is not None and asked.weights.granularity == "channel"
                    seen = packed if across else packed.first(ROWS)  # no more is looked at
                    line.weight_bits, line.weight_levels = measured_bits(
                        seen.dequantized(linear.weight.dtype), asked.weights
                    )
                    line.stored_bytes = packed.nbytes
                    line.stored_bits = 8 * packed.nbytes / linear.weight.numel()
                    stack.enter_context(held_packed(linear, packed, buffer, originals))
                    originals.freed(linear.weight.nbytes)  # of what the codes were made of
                tokens = told if parts[name] == "language" else nothing_known
                stack.enter_context(
                    installed(linear, plan, tokens, weight_too=packed is None, shared=shared, originals=originals)
                )
                del packed
            plan = dataclasses.replace(plan, weight=None) if plan else None
            if not (on_kernel or line.stored_bytes):
                line.weight_bits, line.weight_levels = measured_bits(linear.weight, asked.weights)
            if not on_kernel:
                # Registered last, so that it measures exactly what the matmul receives.
                stack.callback(linear.register_forward_pre_hook(_probe(line, asked.activations, plan)).remove)
        yield


DRAFTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""Options of generation that hand drafts of tokens to the model."""


@contextlib.contextmanager
def _reading_a_cache(model: Any) -> Iterator[None]:
    """While the context is open, `generate` keeps a KV cache and fills it token by token, behind the prompt.

    Without a cache each step would be a prompt of its own, whose other tokens are quantized. Drafts come with the
    prompt, whose scales they would move. A checkpoint that asks for no cache gets one all the same.
    """
    generate, held = model.generate, model.__dict__.get("generate")
    names = list(inspect.signature(generate).parameters)

    @functools.wraps(generate)
    def caching(*args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        for name in DRAFTED:
            if option(model, kwargs, name):
                raise UserError(f"{name}: cannot be combined with quantize.kv, because drafts come with the prompt")
        asked = (kwargs.get("use_cache"), getattr(kwargs.get("generation_config"), "use_cache", None))
        if False in asked:
            raise UserError("use_cache: cannot be false with quantize.kv, because there would be no cache to quantize")
        return generate(**{**kwargs, "use_cache": True})

    model.generate = caching
    try:
        yield
    finally:
        if held is None:
            del model.generate
        else:
            model.generate = held


def plans_of(model: Any, spec: RunSpec, calibration: Any = None) -> tuple[dict[str, nn.Linear], dict[str, LinearPlan]]:
    """The linears that a run quantizes, and the plan of each that its method undertakes to.

    Args:
        model: the loaded model, which stays as it is.
        spec: a run with a `quantize` section.
        calibration: calibration samples as `compress` takes them.
    """
    family, asked = family_of(model), spec.quantize
    if asked is None:
        return {}, {}
    linears = family.linears(asked.scope)
    method = ptqs.create(asked.method.name, **asked.method.params)
    with contextlib.closing(Originals(family.model, "auto")) as originals:
        runner = _calibration(family, asked, calibration, None, originals)
        if asked.allocate and runner is not None:
            asked, _ = allocated(family, asked, linears, runner)
        return linears, method.prepare_each(family.model, linears, asked.formats(linears), runner)


def _calibration(
    family: Family, spec: QuantizeSpec, given: Any, pruned: Pruning | None, originals: Originals
) -> Calibration | None:
    """The calibration of a model with its samples; None for a method that does not calibrate.

    Args:
        family: the model.
        spec: the quantize section.
        given: samples as `compress` takes them.
        pruned: pruning for samples that bring none of their own.
        originals: where original weights are while calibrated ones are in their place.

    Raises:
        UserError: samples are missing, or pruning is.
    """
    if spec.calibration is None:
        return None
    if not isinstance(given, CalibrationSamples):
        if not given:
            asking = f"method: {spec.method}" if spec.allocate is None else f"allocate: {spec.allocate.method}"
            raise UserError(f"quantize.{asking} needs calibration samples; give `calibration=[...]`")
        given = CalibrationSamples(list(given))
    if not spec.calibration.pruned:
        return Calibration(family.model, given, family, originals=originals)
    shorten = given.shorten
    if shorten is None:
        if pruned is None:
            raise UserError("quantize.calibration.pruned: there is no `prune` section to prune with")
        shorten = pruned.shorten
        prune = pruned.spec.model_dump_json()
        given = dataclasses.replace(given, fingerprints={**given.fingerprints, "prune": prune})
    return Calibration(family.model, given, family, shorten, originals)


def _probe(line: LinearReceipt, format: Format | None, plan: LinearPlan | None) -> Any:
    """A hook that counts a linear's calls, and measures the bits of its input at the first one.

    Args:
        line: the linear's line in the receipt.
        format: format asked of its input; None if that is not quantized.
        plan: the linear's plan; None if the method leaves it alone.
    """
    activation = plan.activation if plan and isinstance(plan.activation, TokenActivation) else None

    def probe(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if not line.calls:
            exact = activation.exact if activation else None
            x = args[0]
            if exact is not None:
                line.activation_exact = float(exact.expand(x.shape).float().mean())
                x = x.masked_fill(exact, 0)
            line.activation_bits, line.activation_levels = measured_bits(x, format)
        if activation:
            activation.exact = None  # it may be as large as the input, and every linear would keep one
        line.calls += 1

    return probe
