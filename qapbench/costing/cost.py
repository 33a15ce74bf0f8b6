"""`cost(model, spec, prompt)`: what one prompt costs under a spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from qapbench.methods.kinds import pruners
from qapbench.models.encoded import EncodedImages
from qapbench.models.outline import ImageOutline
from qapbench.receipt import LinearReceipt
from qapbench.spec.run_spec import PruneSpec, QuantizeSpec, RunSpec

from .bits import Bits, kv_bytes, measured_lines, weight_bytes
from .devices import Bound, Device, find_device_peaks
from .flops import activation_bytes, decoder_work, projector_work, tower_work
from .known import CostedModel, costed_model
from .prompt import Prompt
from .selection import Selecting
from .shape import ModelShape, shape_of
from .tokens import MeasuredTokens, token_flow
from .work import Work

Stage = Literal["tower", "projector", "selection", "prefill", "decode"]
STAGES: tuple[Stage, ...] = ("tower", "projector", "selection", "prefill", "decode")


@dataclass(frozen=True)
class StageNumbers:
    """A number for each stage.

    Attributes:
        tower: the vision tower.
        projector: the projector.
        selection: choosing the tokens: what is computed for the pruner alone.
        prefill: the language model on the prompt, with the logits of its last token.
        decode: the language model on one generated token, mean over those that the prompt asks for.
    """

    tower: float
    projector: float
    selection: float
    prefill: float
    decode: float

    @property
    def prompt(self) -> float:
        """All stages up to the first token of the answer."""
        return self.tower + self.projector + self.selection + self.prefill


@dataclass(frozen=True)
class Cost:
    """What one prompt costs. docs/cost.md has the definitions, with their formulas and sources.

    Numbers are those of the whole batch of equal prompts; tokens are those of one prompt.

    Attributes:
        model: name of the model.
        spec: the compression in words.
        prompt: the prompt.
        available: visual tokens before pruning, of all images, without separators.
        tokens_per_layer: visual tokens that each layer of the decoder receives, without separators.
        separators: tokens that the model adds itself (new lines) and that the decoder receives.
        work: FLOPs by precision, and the least bytes that are moved, of each stage.
        weight_bytes: bytes of the weights as they are stored.
        weight_bytes_by_part: the same of each part: language, projector, vision, and "head" for what is in none of
            them.
        kv_bytes: bytes of the KV cache that the prompt leaves.
        activation_bytes: bytes of activations that are held at the same time at most.
    """

    model: str
    spec: str
    prompt: Prompt
    available: float
    tokens_per_layer: tuple[float, ...]
    separators: float
    work: Mapping[Stage, Work]
    weight_bytes: int
    weight_bytes_by_part: Mapping[str, int]
    kv_bytes: float
    activation_bytes: float

    @property
    def layer_mean(self) -> float:
        """Mean over the decoder's layers of the visual tokens that they receive."""
        return sum(self.tokens_per_layer) / len(self.tokens_per_layer)

    @property
    def tokens_share(self) -> float:
        """Visual tokens x layers relative to those without pruning; 1 if there is no image."""
        return self.layer_mean / self.available if self.available else 1.0

    @property
    def flops(self) -> StageNumbers:
        """FLOPs of each stage."""
        return StageNumbers(*(self.work[stage].flops for stage in STAGES))

    @property
    def bops(self) -> StageNumbers:
        """FLOPs x bits x bits / 256 of each stage: equal to the FLOPs where nothing is quantized."""
        return StageNumbers(*(self.work[stage].bops for stage in STAGES))

    @property
    def intensity(self) -> dict[Stage, float]:
        """FLOPs per byte that has to be moved, of each stage that moves any."""
        return {stage: work.intensity for stage, work in self.work.items() if work.bytes}

    def bounds(self, device: str | Device) -> dict[Stage, Bound]:
        """The least time of each stage on a device (roofline).

        Args:
            device: a device, its name (`qapbench.costing.devices`), or "here" for this machine.

        Raises:
            UserError: there is no device of that name.
        """
        peaks = find_device_peaks(device) if isinstance(device, str) else device
        return {stage: peaks.bound(work) for stage, work in self.work.items()}

    def summary(self, device: str | Device | None = None) -> str:
        """The cost in a few lines.

        Args:
            device: also say the least times on this device.
        """
        flops, bops = self.flops, self.bops
        layers = f"{self.layer_mean:.4g} on the average of {len(self.tokens_per_layer)} layers"
        lines = [
            f"{self.model}, {self.spec}",
            f"visual tokens: {self.available:.4g} before pruning, {layers} ({100 * self.tokens_share:.3g} %)",
            f"prompt: {flops.prompt / 1e12:.4g} TFLOPs (tower {flops.tower / 1e12:.3g}, projector "
            f"{flops.projector / 1e12:.3g}, selection {flops.selection / 1e12:.3g}, prefill "
            f"{flops.prefill / 1e12:.4g}), {bops.prompt / 1e12:.4g} T BOPs",
            f"each decoded token: {flops.decode / 1e9:.4g} GFLOPs, {bops.decode / 1e9:.4g} G BOPs",
            f"weights {self.weight_bytes / 1e9:.4g} GB, KV cache {self.kv_bytes / 1e6:.4g} MB, activations "
            f"{self.activation_bytes / 1e6:.4g} MB",
        ]
        if device is not None:
            peaks = find_device_peaks(device) if isinstance(device, str) else device
            times = [f"{stage} {1e3 * b.seconds:.3g} ms ({b.limit})" for stage, b in self.bounds(peaks).items()]
            lines.append(f"at least, on {peaks.name}: {', '.join(times)}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The cost as plain data."""
        return {
            "model": self.model,
            "spec": self.spec,
            "prompt": asdict(self.prompt),
            "available": self.available,
            "tokens_per_layer": list(self.tokens_per_layer),
            "layer_mean": self.layer_mean,
            "tokens_share": self.tokens_share,
            "separators": self.separators,
            "flops": asdict(self.flops),
            "bops": asdict(self.bops),
            "bytes_moved": {stage: self.work[stage].bytes for stage in STAGES},
            "weight_bytes": self.weight_bytes,
            "weight_bytes_by_part": dict(self.weight_bytes_by_part),
            "kv_bytes": self.kv_bytes,
            "activation_bytes": self.activation_bytes,
        }


def cost(
    model: Any,
    spec: RunSpec | Mapping[str, Any] | None = None,
    prompt: Prompt | None = None,
    *,
    receipt: Sequence[LinearReceipt] = (),
    tokens: MeasuredTokens | None = None,
) -> Cost:
    """What one prompt costs a model under a spec. No weight is read.

    Args:
        model: a loaded model; a config, as a mapping or as transformers has it; the name or the hub id of a well-known
            checkpoint, such as "llava-1.5-7b"; an embedded model or a checkpoint folder.
        spec: a RunSpec, or a mapping with `quantize`, `prune` or both, as in a spec file; None for the model as it is.
        prompt: the prompt; None for one image and 64 text tokens.
        receipt: the linears of a run's receipt. They say which of them were quantized, and in how many bits.
        tokens: visual tokens as they were measured; None follows them from the spec.

    Raises:
        UserError: the model is not known, or the spec has mistakes or does not fit the model.
    """
    given = _run_spec(spec)
    prompt = Prompt() if prompt is None else prompt
    costed = costed_model(model, given.dtype, given.text_tower)
    return _cost(costed, given.quantize, given.prune, prompt, receipt, tokens)


def _run_spec(spec: RunSpec | Mapping[str, Any] | None) -> RunSpec:
    """The spec, with a model and a task that nobody reads if it has none."""
    if isinstance(spec, RunSpec):
        return spec
    return RunSpec.parse({"model": "given", "task": "none", **(spec or {})})


def _cost(
    model: CostedModel,
    quantize: QuantizeSpec | None,
    prune: PruneSpec | None,
    prompt: Prompt,
    receipt: Sequence[LinearReceipt],
    measured: MeasuredTokens | None,
) -> Cost:
    """The cost of a model that was found; the other arguments are those of `cost`."""
    family = model.family
    shape = shape_of(family)
    bits = Bits(quantize, measured_lines(receipt))
    pruner = pruners.create(prune.method.name, **prune.method.params) if prune else None
    none = ImageOutline(EncodedImages([], []), ((),) * len(shape.tower), 0, 0)
    outline = family.outline(prompt.images) if prompt.images else none
    planned = token_flow(outline, prune, pruner, shape.depth, family.view_tokens)
    tokens = measured or MeasuredTokens(planned.available, planned.layers, planned.separators)
    if len(tokens.layers) == 1:
        tokens = replace(tokens, layers=tokens.layers * shape.depth)
    columns = [count + tokens.separators + prompt.text for count in tokens.layers]
    needs = pruner.needs & family.available_fields if pruner else frozenset()
    watched = quantize is not None and "vision" in quantize.scope  # such a layer runs, whoever reads it
    layers = len(shape.tower) if watched else family.tower_layers(needs)
    choosing = Work()
    if prune and pruner:
        tower = model.text_tower if pruner.needs & {"image_embeds", "text_embeds"} else None
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
