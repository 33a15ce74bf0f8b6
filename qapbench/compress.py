"""`compress(model, spec)`: any supported Hugging Face model, quantized and pruned while the context is open."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from . import backends
from .calibration import Calibration, CalibrationSamples
from .errors import UserError
from .install import installed, watching
from .models import Family, family_of
from .models.family import default_tower
from .models.relevance import QuestionReader, TextTower, find_tower, load_tower
from .prune import PrunedCalls
from .quantization import LinearPlan, TokenActivation
from .receipt import LinearReceipt, Receipt, measured_bits
from .spec import PruneSpec, QuantizeSpec, RunSpec
from .strategy import DecoderPruner, metrics, pruners, ptqs


@contextlib.contextmanager
def compress(
    model: Any,
    spec: RunSpec | Mapping[str, Any],
    processor: Any = None,
    text_tower: TextTower | str | None = None,
    calibration: Any = None,
) -> Iterator[Receipt]:
    """Quantize and prune a loaded model; inside the context `model(...)` and `model.generate(...)` run compressed.

    After the context the model is as it was, to the bit. `generate` returns the caller's own prompt in front of
    the new tokens, so the usual `out[:, inputs.input_ids.shape[1]:]` holds; a plain forward's logits have the
    length of the shortened sequence. Inputs may be batched and padded on either side. Both calls take
    `relevance_text=[...]`, one question an image, for pruners that weigh the question; where it is not given
    the prompt is decoded with `processor`.

    Args:
        spec: a RunSpec, or a mapping with `quantize` and / or `prune` as a spec file has them.
        text_tower: CLIP checkpoint with the joint space of the model's vision tower (folder, hub id, or loaded).
        calibration: samples for PTQ methods that need them: a sequence of the model's keyword arguments, one question
            each (`relevance_text` among them where calibration prunes by the question), or `CalibrationSamples`.

    Yields:
        The receipt, which fills as the model runs.

    Raises:
        UserError: the spec does not fit this model.
    """
    quantize, prune = _sections(spec)
    owner = spec.text_tower if isinstance(spec, RunSpec) else None
    family = family_of(model)
    receipt = Receipt()
    with contextlib.ExitStack() as stack:
        # Calibration may prune as the runs do; what it prunes is not counted among them.
        pruned = pruned_calls(family, prune, receipt, processor, text_tower, owner) if prune else None
        if quantize:
            aside = dataclasses.replace(pruned, receipt=Receipt()) if pruned else None
            stack.enter_context(_quantized(family, quantize, receipt, calibration, aside))
        if pruned:
            stack.enter_context(pruned.installed())
        yield receipt


def _sections(spec: RunSpec | Mapping[str, Any]) -> tuple[QuantizeSpec | None, PruneSpec | None]:
    if isinstance(spec, RunSpec):
        return spec.quantize, spec.prune
    if unknown := set(spec) - {"quantize", "prune"}:
        raise UserError(f"spec: unknown section '{sorted(unknown)[0]}'; compress reads `quantize` and `prune`")
    filled = RunSpec.parse({**spec, "model": "given", "task": "none"})
    return filled.quantize, filled.prune


@contextlib.contextmanager
def _quantized(
    family: Family, spec: QuantizeSpec, receipt: Receipt, calibration: Any, pruned: PrunedCalls | None
) -> Iterator[None]:
    receipt.quantization = str(spec.method)
    receipt.wants_weights, receipt.wants_activations = spec.weights is not None, spec.activations is not None
    receipt.backend = backends.describe(spec.backend, family.model.device)
    linears = family.linears(spec.scope)
    parts = {name: part for part in spec.scope for name in family.linears([part])}
    method = ptqs.create(spec.method.name, **spec.method.params)
    runner = _calibration(family, spec, calibration, pruned)
    plans = method.prepare(family.model, linears, spec.weights, spec.activations, runner)
    if runner is not None:
        receipt.calibration = runner.used
    with contextlib.ExitStack() as stack:
        asks = any(plan.asks for plan in plans.values())
        look = stack.enter_context(watching(family.core, family.image_token)) if asks else lambda: None
        for name, linear in linears.items():
            plan = plans.get(name)
            if plan is None:
                receipt.fall_back(f"{name}: left in full precision by {spec.method}")
            shape = (linear.out_features, linear.in_features)
            line = LinearReceipt(name, parts[name], shape, planned=plan is not None)
            receipt.linears.append(line)
            on_kernel = plan is not None and spec.backend == "torchao"
            if plan is not None and on_kernel:
                stack.enter_context(backends.int8_linear(linear, plan, line))
            elif plan is not None:
                stack.enter_context(installed(linear, plan, look if parts[name] == "language" else lambda: None))
            if not on_kernel:
                line.weight_bits, line.weight_levels = measured_bits(linear.weight, spec.weights)
                # Registered last: it sees what the matmul sees.
                stack.callback(linear.register_forward_pre_hook(_probe(line, spec, plan)).remove)
        yield


def _calibration(family: Family, spec: QuantizeSpec, given: Any, pruned: PrunedCalls | None) -> Calibration | None:
    """Samples and model brought together; None for methods that do not calibrate."""
    if spec.calibration is None:
        return None
    if not isinstance(given, CalibrationSamples):
        if not given:
            raise UserError(f"quantize.method: {spec.method} needs calibration samples; give `calibration=[...]`")
        given = CalibrationSamples(list(given))
    if not spec.calibration.pruned:
        return Calibration(family.model, given, family)
    shorten = given.shorten
    if shorten is None:
        if pruned is None:
            raise UserError("quantize.calibration.pruned: there is no `prune` section to prune with")
        shorten = pruned.shorten
        prune = pruned.spec.model_dump_json()
        given = dataclasses.replace(given, fingerprints={**given.fingerprints, "prune": prune})
    return Calibration(family.model, given, family, shorten)


def _probe(line: LinearReceipt, spec: QuantizeSpec, plan: LinearPlan | None) -> Any:
    def look(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if not line.calls:
            exact = plan.activation.exact if plan and isinstance(plan.activation, TokenActivation) else None
            x = args[0]
            if exact is not None:
                line.activation_exact = float(exact.expand(x.shape).float().mean())
                x = x.masked_fill(exact, 0)
            line.activation_bits, line.activation_levels = measured_bits(x, spec.activations)
        line.calls += 1

    return look


def pruned_calls(
    family: Family, spec: PruneSpec, receipt: Receipt, processor: Any = None, tower: TextTower | str | None = None,
    owner: str | None = None,
) -> PrunedCalls:  # fmt: skip
    """The pruning of one spec, ready to shorten prompts of this model, but not installed on it.

    Args:
        tower: text tower as `compress` takes it; owner: the one that the spec names.

    Raises:
        UserError: the method needs what this model does not offer.
    """
    receipt.pruning = spec.label
    pruner = pruners.create(spec.method.name, **spec.method.params)
    inside = isinstance(pruner, DecoderPruner)
    offers = DecoderPruner.DECODER_FIELDS if inside else family.offers | QuestionReader.FIELDS
    if missing := pruner.needs - pruner.optional - offers:
        raise UserError(
            f"prune.method: {spec.method} needs {', '.join(sorted(missing))}, which this model does not offer"
        )
    for name in sorted(pruner.needs & family.stand_ins.keys()):
        receipt.fall_back(f"{name}: {family.stand_ins[name]}")
    for name in sorted(pruner.optional - family.offers - QuestionReader.FIELDS):
        receipt.fall_back(f"{name}: this model has none, and {spec.method} does without")
    joint = joint_space(family, tower or owner, receipt) if pruner.needs & {"image_embeds", "text_embeds"} else None
    reader = QuestionReader(frozenset() if inside else pruner.needs, joint, family.model.get_input_embeddings())
    if reader.needs_text and processor is None:
        processor = _own_tokenizer(family)
    sensitivity = metrics.create(spec.sensitivity.name, **spec.sensitivity.params) if spec.sensitivity else None
    return PrunedCalls(family, spec, pruner, sensitivity, reader, receipt, processor)


def joint_space(family: Family, named: TextTower | str | None, receipt: Receipt) -> TextTower | None:
    """The text tower; None, noted in the receipt, where relevance falls back on the language model."""
    if family.clip_width is None:
        if named is not None:
            raise UserError("text_tower: this model's vision tower is no CLIP's, so no text tower shares its space")
        receipt.fall_back("relevance from the language model's embeddings: the vision tower is no CLIP's")
        return None
    if isinstance(named, TextTower):
        return named
    config = family.model.config
    folder, reason = find_tower(named, str(family.model.name_or_path), default_tower(config.to_dict()), True)
    if folder is None:
        receipt.fall_back(f"relevance from the language model's embeddings: {reason}")
        return None
    return load_tower(folder, family.clip_width, family.model.device)


def _own_tokenizer(family: Family) -> Any:
    """The tokenizer in the model's folder, to read the question back from a prompt's ids; None where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(family.model.name_or_path)
    except (OSError, ValueError):
        return None
