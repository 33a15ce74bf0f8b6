"""Receipts of what was quantized: one per linear, measured on the tensors themselves, and one of the calibration."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from qapbench.errors import RunFailedError
from qapbench.methods.floating import Element, FloatLevels
from qapbench.methods.formats import Format
from qapbench.methods.kv import KVSide

ENOUGH = 32  # values whose gaps tell a step
OFF_GRID = 0.15  # of a step, mean distance: see _off_grid
ROWS = 8  # rows of a tensor that are inspected: enough to see 2^bits levels, cheap enough for every linear

LATER = ("stored_bits", "stored_bytes", "asked")  # fields that say something of some linears only


class NotQuantizedError(RunFailedError):
    """The spec asks for quantization that never reached a matmul."""


class LinearReceipt(BaseModel):
    """What was measured of one linear in scope, filled while the model runs.

    Attributes:
        name: in the model; `part`: language, projector or vision; `shape`: (outputs, inputs).
        weight_bits: bits of the weight that the matmul saw; the dtype's width where it was not quantized.
        activation_bits: the same of its input, at its first call; None while it was never called.
        weight_levels, activation_levels: most distinct values found in one group, the evidence for the bits.
        calls: forward passes.
        activation_exact: share of that input's elements that were passed on in full precision beside the quantized
            ones (outliers); `activation_bits` are those of the others.
        planned: whether the method undertook to quantize it; what it left out is a fallback, not a fault.
        stored_bytes: bytes that a packed weight takes, with its scales; None for one that is not packed, and then not
            stored. `stored_bits`: the same in bits per weight.
        asked: (bits of the weight, bits of the input) that the spec asks of this linear, 16 for no quantization; None,
            and then not stored, where it asks the same of all.
    """

    name: str
    part: str
    shape: tuple[int, int] | None = None
    weight_bits: int = 0
    weight_levels: int = 0
    activation_bits: int | None = None
    activation_levels: int | None = None
    activation_exact: float = 0.0
    calls: int = 0
    planned: bool = True
    stored_bits: float | None = None
    stored_bytes: int | None = None
    asked: tuple[int, int] | None = None

    @model_serializer(mode="wrap")
    def _without_later(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain data. Fields that came later are left out where they say nothing."""
        return {name: value for name, value in dump(self).items() if value is not None or name not in LATER}


class CalibrationUse(BaseModel):
    """The calibration that a quantization rests on.

    Attributes:
        samples: how many; `origin`: where they came from, in words.
        reused: whether an earlier result was read; `made_again`: why one that was there could not be.
        key: hash of all that the result depends on; None where it is not kept.
        seconds, peak_memory_mb, peak_gpu_memory_mb: what finding or reading it took.
    """

    samples: int
    origin: str
    reused: bool = False
    key: str | None = None
    seconds: float = 0.0
    peak_memory_mb: int | None = None
    peak_gpu_memory_mb: int | None = None
    made_again: str | None = None


class AllocationUse(BaseModel):
    """How bits were allocated to layers.

    Attributes:
        method: who chose.
        bits_asked: bits per weight that might be reached, mean over the allocated weights; `bits`: those that were.
        choices: numbers of bits to choose from.
        errors: the measured error of each layer (or linear) with each of the choices, by glob over its linears.
        overrides: what was chosen, as it can be written under `quantize.overrides`.
    """

    method: str
    bits_asked: float
    bits: float
    choices: list[int]
    errors: dict[str, list[float]]
    overrides: dict[str, dict[str, dict[str, int]]]


class KVUse(BaseModel):
    """What the KV cache held of the first prompt, measured on what the layers read.

    Attributes:
        format: the format in words.
        bits_asked: bits of the keys and of the values.
        tokens: tokens in a layer's cache, mean over the layers; padding does not count.
        quantized: how many of them are quantized, mean over keys and values.
        bits: bits per value, with scales and the tokens that are not quantized.
        token_bits: tokens * bits, mean over the layers: the size of the cache, in bits per channel of keys or values.
        key_levels: most distinct values found in a group of keys; 0 if none is quantized.
        value_levels: the same of the values.
        layers: the same for each layer: (tokens, bits, quantized, key levels, value levels).
    """

    format: str
    bits_asked: tuple[int, int]
    tokens: float = 0.0
    quantized: float = 0.0
    bits: float = 0.0
    token_bits: float = 0.0
    key_levels: int = 0
    value_levels: int = 0
    layers: dict[int, tuple[int, float, float, int, int]] = Field(default_factory=dict, exclude=True)

    def restart(self) -> None:
        """Measure the next prompt."""
        self.layers = {}

    def note(self, index: int, tokens: int, bits: float, quantized: float, levels: tuple[int, int]) -> None:
        """Note what was measured of one layer."""
        self.layers[index] = (tokens, bits, quantized, *levels)
        rows = list(self.layers.values())
        self.tokens = sum(row[0] for row in rows) / len(rows)
        self.token_bits = sum(row[0] * row[1] for row in rows) / len(rows)
        self.bits = self.token_bits / self.tokens if self.tokens else 0.0
        self.quantized = sum(row[2] for row in rows) / len(rows)
        self.key_levels, self.value_levels = max(row[3] for row in rows), max(row[4] for row in rows)

    def check(self) -> None:
        """Check that the cache was read, and that what was read has no more levels than the format.

        Raises:
            NotQuantizedError: it was not, or it has.
        """
        if not self.tokens:
            raise NotQuantizedError(f"{self.format}: no layer has read the KV cache")
        for what, bits, levels in zip(
            ("keys", "values"), self.bits_asked, (self.key_levels, self.value_levels), strict=True
        ):
            if levels > 2**bits:
                raise NotQuantizedError(f"{self.format}: {what} of the KV cache have {levels} levels in a group")


def most_levels(x: Tensor, side: KVSide) -> int:
    """Most distinct values in any group of quantized keys or values [H, n, D], of which a few rows are inspected."""
    if not x.numel():
        return 0
    rows = (x.transpose(-1, -2) if side.granularity == "channel" else x).flatten(0, -2)[:ROWS]
    return max(_distinct(group) for group in rows.float().split(side.group_size, dim=-1))


def measured_bits(x: Tensor, format: Format | None) -> tuple[int, int]:
    """(bits, levels) of a tensor [..., D] as it reached a matmul.

    A few rows are inspected. Quantized is what has at most 2^bits distinct values in every group and, where a
    group is too small for that to say anything, values on the format's grid. Else the dtype's own width is reported.
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
    if size > 2**format.bits:
        return format.bits, levels
    levels_of = format.levels
    if isinstance(levels_of, FloatLevels):
        telling = _off_floats(groups[0], levels_of.element) < OFF_GRID
    else:
        telling = _off_grid(groups[0], format.bits, torch.finfo(x.dtype).eps) < OFF_GRID
    return (format.bits if telling else full), levels


def _distinct(group: Tensor) -> int:
    """Most distinct values in a row of [R, G]."""
    return int((group.sort(dim=-1).values.diff(dim=-1) != 0).sum(dim=-1).max()) + 1 if group.numel() else 0


def _off_floats(group: Tensor, element: Element) -> float:
    """How far values [R, G] are from numbers of a floating-point type times a scale, in steps of that type.

    The largest magnitude of a row may be any number of the type. A scale that is off by a power of two makes no
    difference, so only its mantissa has to be tried.
    """
    most = group.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    binade, distances = 2.0**element.exponent, []
    for numerator in range(2**element.mantissa, 2 ** (element.mantissa + 1)):
        largest = binade * numerator / 2**element.mantissa
        if largest <= element.top:
            scaled = group / (most / largest)
            exponent = scaled.abs().clamp(min=2.0**element.least).log2().floor()
            step = torch.exp2(exponent - element.mantissa)
            distances.append(((scaled - element.round(scaled)).abs() / step).mean(dim=-1))
    return float(torch.stack(distances).amin(dim=0).median())


def _off_grid(group: Tensor, bits: int, eps: float) -> float:
    """How far values [R, G] are from multiples of a step, in steps: 0 on a grid, 0.25 for values at random.

    The step is the range (with zero) over the number of levels, give or take the one that a rounded zero point
    costs; or, where a scale is shared with values that are not here (other tokens, outliers), the least gap that so
    many levels can have. Few values lie on a grid if some step between 1 and 1 / (2^bits - 1) of their own span
    divides all of their distances, up to what rounding to their dtype, with the relative precision `eps`, explains.
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
    else:
        values = group.sort(dim=-1).values
        span = values[..., -1:] - values[..., :1]
        step = (
            (span / torch.arange(1, 2**bits, device=group.device))
            .unsqueeze(-1)
            .clamp(min=torch.finfo(torch.float32).tiny)
        )
        scaled = (values - values[..., :1]).unsqueeze(-2) / step
        noise = 2 * eps * (reach.unsqueeze(-1) / step + scaled)
        fits = ((scaled - scaled.round()).abs() <= noise.clamp(max=OFF_GRID / 2)).all(dim=-1).any(dim=-1)
        distances.append(torch.where(fits, 0.0, torch.inf))
    return float(torch.stack(distances).amin(dim=0).median())
