"""Counts what one prompt costs a model under a spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qapbench.methods.decoder_pruner import DecoderPruner
from qapbench.methods.kinds import pruners
from qapbench.models.encoded import EncodedImages
from qapbench.models.outline import ImageOutline
from qapbench.prune.decoder_fields import check_drops
from qapbench.receipt import LinearReceipt
from qapbench.spec.overrides import check_fitting
from qapbench.spec.run_spec import PruneSpec, QuantizeSpec

from .amounts import Cost, Stage
from .bits import Bits, kv_bytes, measured_lines, weight_bytes
from .flops import activation_bytes, decoder_work, projector_work, tower_work
from .known import CostedModel
from .prompt import Prompt
from .selection import Selecting
from .shape import ModelShape, shape_of
from .tokens import MeasuredTokens, token_flow
from .work import Work


def counted(
    model: CostedModel,
    quantize: QuantizeSpec | None = None,
    prune: PruneSpec | None = None,
    prompt: Prompt = Prompt(),  # noqa: B008 (it is immutable)
    receipt: Sequence[LinearReceipt] = (),
    measured: MeasuredTokens | None = None,
) -> Cost:
    """The cost of a model that was found.

    Args:
        model: the model.
        quantize: the `quantize` section; None for full precision.
        prune: the `prune` section, with a number of tokens; None keeps all.
        prompt: the prompt.
        receipt: the linears of a run's receipt, as `cost` takes them.
        measured: visual tokens as they were measured; None follows them from the spec.

    Raises:
        UserError: tokens cannot be dropped where the spec drops them.
    """
    family = model.family
    shape = shape_of(family)
    if quantize and quantize.overrides:
        check_fitting(quantize.overrides, [one.name for one in shape.products if one.part in quantize.scope])
    bits = Bits(quantize, measured_lines(receipt))
    pruner = pruners.create(prune.method.name, **prune.method.params) if prune else None
    none = ImageOutline(EncodedImages([], []), ((),) * len(shape.tower), 0, 0)
    outline = family.outline(prompt.images) if prompt.images else none
    planned = token_flow(outline, prune, pruner, shape.depth, family.view_tokens)
    if isinstance(pruner, DecoderPruner):
        check_drops(family.decoder, pruner, {index for view in planned.views for index in view.stages})
    tokens = measured or MeasuredTokens(planned.available, planned.layers, planned.separators)
    if len(tokens.layers) == 1:
        tokens = replace(tokens, layers=tokens.layers * shape.depth)
    columns = [count + tokens.separators + prompt.text for count in tokens.layers]
    needs = pruner.front_needs & family.available_fields if pruner else frozenset()
    watched = quantize is not None and "vision" in quantize.scope  # such a layer runs, whoever reads it
    layers = len(shape.tower) if watched else family.tower_layers(needs)
    choosing = Work()
    if prune and pruner:
        tower = model.text_tower if pruner.front_needs & {"image_embeds", "text_embeds"} else None
        selecting = Selecting(shape, prune, pruner, outline, prompt.images, planned, prompt, tower, bits)
        choosing = selecting.work()
    stored = weight_bytes(shape, bits)
    parts = _by_part(shape, stored)
    held = kv_bytes(shape, bits, columns)
    ahead = (prompt.new_tokens + 1) / 2  # tokens of the answer that a decoded one attends to, itself included
    grown = [count + ahead for count in columns]
    reads = parts["language"] + parts["head"] - stored.get(shape.table, 0)
    if shape.head.name + ".weight" not in stored:  # tied: the embedding table makes the logits too
        reads += stored.get(shape.table, 0)
    one = [1.0] * shape.depth
    works: dict[Stage, Work] = {
        "tower": _moving(tower_work(shape, outline, layers, bits), prompt.batch, parts["vision"]),
        "projector": _moving(projector_work(shape, outline.projected, bits), prompt.batch, parts["projector"]),
        "selection": _moving(choosing, prompt.batch, 0),
        "prefill": _moving(
            decoder_work(shape, columns, columns, bits, True), prompt.batch, reads + prompt.batch * held
        ),
        "decode": _moving(
            decoder_work(shape, one, grown, bits, False),
            prompt.batch,
            reads + prompt.batch * kv_bytes(shape, bits, grown),
        ),
    }
    said = [quantize.label if quantize else "full precision", *([prune.label] if prune else [])]
    return Cost(
        model=model.name,
        spec=", ".join(said),
        prompt=prompt,
        available=tokens.available,
        tokens_per_layer=tokens.layers,
        separators=tokens.separators,
        work=works,
        weight_bytes=sum(stored.values()),
        weight_bytes_by_part=parts,
        kv_bytes=prompt.batch * held,
        activation_bytes=activation_bytes(shape, outline, columns, prompt.batch),
    )


def _moving(work: Work, batch: int, moved: float) -> Work:
    """The work of a batch, with the bytes that it moves."""
    return Work({kind: n * batch for kind, n in work.products.items()}, moved)


def _by_part(shape: ModelShape, stored: Mapping[str, int]) -> dict[str, int]:
    """Bytes of the weights by part of the model; the tower includes the embedding of its patches."""
    names = {id(module): name for name, module in shape.family.model.named_modules()}
    family = shape.family
    roots = {part: [names[id(root)] for root in family.roots(part)] for part in family.parts}
    roots["vision"] = [names[id(family.tower)]]
    parts = dict.fromkeys((*family.parts, "head"), 0)
    for name, size in stored.items():
        # The projector may be a part of the tower's module, so the longest prefix counts.
        fitting = [(len(root), part) for part, own in roots.items() for root in own if name.startswith(f"{root}.")]
        parts[max(fitting)[1] if fitting else "head"] += size
    return parts
