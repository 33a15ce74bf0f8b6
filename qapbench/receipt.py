"""What compression really did, measured on the tensors themselves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .quantization import Format
from .splice import KeptImage

ENOUGH = 32  # values whose gaps tell a step
OFF_GRID = 0.15  # of a step, mean distance: see _off_grid
ROWS = 8  # rows of a tensor that are inspected: enough to see 2^bits levels, cheap enough for every linear


class NotQuantizedError(RuntimeError):
    """The spec asks for quantization that never reached a matmul."""


@dataclass
class LinearReceipt:
    """One linear in scope.

    Attributes:
        weight_bits: bits of the weight that the matmul saw; the dtype's width where it was not quantized.
        activation_bits: the same of its input, at its first call; None while it was never called.
        weight_levels, activation_levels: most distinct values found in one group, the evidence for the bits.
        calls: forward passes.
        activation_exact: share of that input's elements that were passed on in full precision beside the quantized
            ones (outliers); `activation_bits` are those of the others.
        planned: whether the method undertook to quantize it; what it left out is a fallback, not a fault.
    """

    name: str
    part: str
    shape: tuple[int, int]
    weight_bits: int = 0
    weight_levels: int = 0
    activation_bits: int | None = None
    activation_levels: int | None = None
    activation_exact: float = 0.0
    calls: int = 0
    planned: bool = True


@dataclass
class Receipt:
    """What `compress` did. Filled while the model runs.

    Attributes:
        images: images that were pruned; `available`, `kept`, `merged`: tokens, summed over them.
        least, most: smallest and largest budget (kept + merged) of an image; where tokens are dropped inside the
            decoder, of what its last layer saw.
        layers: tokens that each layer of the decoder saw, summed over images; empty where all see the same.
        fallbacks: what was done otherwise than asked, in words.
        backend: what multiplied: a simulation, or which library's kernels.
        calibration: samples, where they came from, whether the result was read, seconds and peak memory.
        separators: tokens of the model's own (new lines between rows of tiles) that stayed, summed; not in the budget.
        latest: what the latest pruned call kept of each image, for whoever stores or draws it; not part of the record.
    """

    quantization: str | None = None
    pruning: str | None = None
    wants_weights: bool = False
    wants_activations: bool = False
    linears: list[LinearReceipt] = field(default_factory=list)
    images: int = 0
    available: int = 0
    kept: int = 0
    merged: int = 0
    least: int | None = None
    most: int | None = None
    layers: list[int] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    backend: str | None = None
    calibration: dict[str, Any] | None = None
    separators: int = 0
    latest: list[KeptImage] | None = field(default=None, repr=False, compare=False)

    def saw_image(
        self, available: int, kept: int, merged: int, separators: int = 0, layers: Sequence[int] = ()
    ) -> None:
        budget = kept + merged
        self.separators += separators
        self.layers = [sum(pair) for pair in itertools.zip_longest(self.layers, layers, fillvalue=0)]
        self.images += 1
        self.available += available
        self.kept += kept
        self.merged += merged
        self.least = budget if self.least is None else min(self.least, budget)
        self.most = budget if self.most is None else max(self.most, budget)

    def recount(self, images: list[dict[str, Any]]) -> None:
        """Count images anew from what was stored beside the answers: also those of earlier sessions.

        Each image holds `available`, and where it was pruned the indices `kept` and the numbers `merged`,
        `separators` and `layers`.
        """
        self.images = self.available = self.kept = self.merged = self.separators = 0
        self.least = self.most = None
        self.layers = []
        for image in images:
            kept = len(image["kept"]) if "kept" in image else image["available"]
            more = image.get("merged", 0), image.get("separators", 0), image.get("layers", ())
            self.saw_image(image["available"], kept, *more)

    def fall_back(self, what: str) -> None:
        if what not in self.fallbacks:
            self.fallbacks.append(what)

    @property
    def tokens(self) -> dict[str, float | int]:
        """Visual tokens per image, as measured; empty where no image was pruned."""
        if not self.images:
            return {}
        n = self.images
        counted: dict[str, float | int] = {
            "images": n, "available": self.available / n, "mean": (self.kept + self.merged) / n, "min": self.least or 0,
            "max": self.most or 0, "kept": self.kept / n, "merged": self.merged / n,
        }  # fmt: skip
        if self.layers:
            counted["layer_mean"] = sum(self.layers) / n / len(self.layers)
        return {**counted, "separators": self.separators / n} if self.separators else counted

    def check(self) -> None:
        """Raise NotQuantizedError where the spec asks for what did not reach a matmul.

        Every linear that the method undertook must show it, those that were not called yet apart; and there must be
        one that does.
        """
        planned = [line for line in self.linears if line.planned]
        called = [line for line in planned if line.calls]
        if self.wants_weights:
            self._check("weights were", [line for line in planned if line.weight_bits < 16], planned)
        if self.wants_activations:
            self._check("activations were", [line for line in called if (line.activation_bits or 32) < 16], called)

    def _check(self, what: str, good: list[LinearReceipt], of: list[LinearReceipt]) -> None:
        if len(good) == len(of) and good:
            return
        bad = next((line.name for line in of if line not in good), "")
        raise NotQuantizedError(
            f"{self.quantization}: {what} to be quantized, but {len(good)} of {len(of)} linears in use show it"
            + (f"; not {bad}" if bad else "")
        )

    def summary(self) -> str:
        """One line for tables."""
        parts = [self._quantization_line() if self.quantization else "full precision"]
        if self.tokens and self.pruning:
            t = self.tokens
            merged = f" ({t['kept']:g} kept + {t['merged']:g} merged)" if self.merged else ""
            lines = f" and {t['separators']:g} separators" if self.separators else ""
            layers = f" in the last layer, {t['layer_mean']:.4g} on the average of layers" if self.layers else ""
            parts.append(f"{self.pruning}: {t['mean']:g} of {t['available']:g} tokens{merged}{lines}{layers}")
        if self.fallbacks:
            parts.append(f"{len(self.fallbacks)} fallback(s)")
        return "; ".join(parts)

    def _quantization_line(self) -> str:
        seen = {(line.weight_bits, line.activation_bits) for line in self.linears if line.calls}
        bits = ", ".join(f"W{w}A{a}" for w, a in sorted(seen, key=str)) or "no linear was called"
        called = sum(1 for line in self.linears if line.calls)
        scope = ", ".join(sorted({line.part for line in self.linears}))
        return f"{self.quantization}: {bits} at {called} of {len(self.linears)} linears ({scope})"

    def to_json(self) -> dict[str, Any]:
        return {
            "summary": self.summary(),
            **{k: v for k, v in asdict(replace(self, latest=None)).items() if k != "latest"},
        }


def measured_bits(x: Tensor, format: Format | None) -> tuple[int, int]:
    """(bits, levels) of a tensor [..., D] as it reached a matmul.

    A few rows are inspected. Quantized is what has at most 2^bits distinct values in every group and, where a
    group is too small for that to say anything, values on a uniform grid. Else the dtype's own width is reported.
    """
    full = torch.finfo(x.dtype).bits
    if format is not None and format.granularity == "channel":  # a scale for each channel, over a sample's tokens
        x = x.flatten(0, -3)[0].mT if x.ndim > 2 else x.mT
    rows = x.detach().reshape(-1, x.shape[-1])[:ROWS].float()
    size = min((format.group_size if format else None) or rows.shape[-1], rows.shape[-1])
    groups = list(rows.split(size, dim=-1))
    levels = max(_distinct(group) for group in groups)
    if format is None or levels > 2**format.bits:
        return full, levels
    telling = size > 2**format.bits or _off_grid(groups[0], format.bits) < OFF_GRID
    return (format.bits if telling else full), levels


def _distinct(group: Tensor) -> int:
    """Most distinct values in a row of [R, G]."""
    return int((group.sort(dim=-1).values.diff(dim=-1) != 0).sum(dim=-1).max()) + 1 if group.numel() else 0


def _off_grid(group: Tensor, bits: int) -> float:
    """How far values [R, G] are from multiples of a step, in steps: 0 on a grid, 0.25 for values at random.

    The step is the range (with zero) over the number of levels, give or take the one that a rounded zero point
    costs; or, where a scale is shared with values that are not here (other tokens, outliers), the least gap that so
    many levels can have.
    """
    low, high = group.amin(-1, keepdim=True).clamp(max=0), group.amax(-1, keepdim=True).clamp(min=0)
    reach = torch.maximum(-low, high)
    spans = [(high - low, 2**bits + extra) for extra in (-2, -1, 0)] + [(reach, 2 ** (bits - 1) - 1)]
    distances = []
    for span, steps in spans:
        scaled = group / (span / steps).clamp(min=torch.finfo(torch.float32).tiny)
        distances.append((scaled - scaled.round()).abs().mean(dim=-1))
    if group.shape[-1] >= ENOUGH:
        values = group.sort(dim=-1).values
        gaps = values.diff(dim=-1)
        shortest = (0.75 * (values[..., -1:] - values[..., :1]) / 2**bits).clamp(min=torch.finfo(torch.float32).tiny)
        step = gaps.masked_fill(gaps < shortest, torch.inf).amin(-1, keepdim=True)
        scaled = (values - values[..., :1]) / step
        distances.append((scaled - scaled.round()).abs().mean(dim=-1))
    return float(torch.stack(distances).amin(dim=0).median())
