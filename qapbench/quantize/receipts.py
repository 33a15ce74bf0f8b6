"""Receipts of what was quantized: of each linear, of the calibration, of the allocation of bits and of the KV cache.

They are read back wherever results are, so this loads no torch. What measures tensors for them is `measured_bits`.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer

from qapbench.errors import RunFailedError

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
