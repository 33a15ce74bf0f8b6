"""What one prompt costs: the numbers, and how they are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .devices import Bound, Device, find_device_peaks
from .prompt import Prompt
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
