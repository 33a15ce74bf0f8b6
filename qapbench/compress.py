"""`compress(model, spec)`: any supported Hugging Face model, quantized and pruned while the context is open."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .errors import UserError
from .models import Family, family_of
from .models.family import default_tower
from .models.relevance import QuestionReader, TextTower, find_tower, load_tower
from .prune import PrunedCalls
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
        calibration: samples for PTQ methods that need them.

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
        if quantize:
            stack.enter_context(_quantized(family, quantize, receipt, calibration))
        if prune:
            stack.enter_context(pruned_calls(family, prune, receipt, processor, text_tower, owner).installed())
        yield receipt


def _sections(spec: RunSpec | Mapping[str, Any]) -> tuple[QuantizeSpec | None, PruneSpec | None]:
    if isinstance(spec, RunSpec):
        return spec.quantize, spec.prune
    if unknown := set(spec) - {"quantize", "prune"}:
        raise UserError(f"spec: unknown section '{sorted(unknown)[0]}'; compress reads `quantize` and `prune`")
    filled = RunSpec.parse({**spec, "model": "given", "task": "none"})
    return filled.quantize, filled.prune


@contextlib.contextmanager
def _quantized(family: Family, spec: QuantizeSpec, receipt: Receipt, calibration: Any) -> Iterator[None]:
    receipt.quantization = str(spec.method)
    receipt.wants_weights, receipt.wants_activations = spec.weights is not None, spec.activations is not None
    linears = family.linears(spec.scope)
    parts = {name: part for part in spec.scope for name in family.linears([part])}
    method = ptqs.create(spec.method.name, **spec.method.params)
    plans = method.prepare(family.model, linears, spec.weights, spec.activations, calibration)
    with contextlib.ExitStack() as stack:
        for name, linear in linears.items():
            plan = plans.get(name)
            if plan is None:
                receipt.fall_back(f"{name}: left in full precision by {spec.method}")
            elif plan.weight is not None:
                stack.enter_context(_weight(linear, plan.weight(linear.weight.detach())))
            if plan is not None and plan.activation is not None:
                quantize = plan.activation
                handle = linear.register_forward_pre_hook(lambda _, args, q=quantize: (q(args[0]), *args[1:]))
                stack.callback(handle.remove)
            bits, levels = measured_bits(linear.weight, spec.weights)
            shape = (linear.out_features, linear.in_features)
            line = LinearReceipt(name, parts[name], shape, bits, levels, planned=plan is not None)
            receipt.linears.append(line)
            # Registered last: it sees what the matmul sees.
            stack.callback(linear.register_forward_pre_hook(_probe(line, spec)).remove)
        yield


def _probe(line: LinearReceipt, spec: QuantizeSpec) -> Any:
    def look(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if not line.calls:
            line.activation_bits, line.activation_levels = measured_bits(args[0], spec.activations)
        line.calls += 1

    return look


@contextlib.contextmanager
def _weight(linear: nn.Linear, weight: torch.Tensor) -> Iterator[None]:
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
