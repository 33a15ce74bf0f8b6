"""Receipts: what compression really did, measured on the tensors themselves."""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from .quantize.receipts import AllocationUse, CalibrationUse, KVUse, LinearReceipt, NotQuantizedError

__all__ = ["CalibrationUse", "ImageTokens", "KVUse", "LinearReceipt", "NotQuantizedError", "Receipt", "ReceiptFields"]


class ImageTokens(BaseModel):
    """Token counts of one image.

    Attributes:
        available: number of tokens before pruning.
        kept: places of the kept tokens among the image's placeholders, ascending; None if nothing was pruned.
        merged: number of tokens that were made from several.
        separators: number of tokens that the model adds itself (new lines) and that stayed.
        layers: tokens that each layer of the decoder received, if tokens are dropped inside it; else empty.
        transparent: whether the image has transparent pixels.
    """

    model_config = ConfigDict(frozen=True)

    available: Annotated[int, Field(ge=0)]
    kept: list[int] | None = None
    merged: int = 0
    separators: int = 0
    layers: list[int] = Field(default_factory=list)
    transparent: bool = False

    @property
    def pruned(self) -> bool:
        """Whether the image went through a pruner."""
        return self.kept is not None

    def to_json(self) -> dict[str, Any]:
        """The counts as plain data, without empty fields."""
        pruned = {} if self.kept is None else {"kept": self.kept, "merged": self.merged}
        more = {name: getattr(self, name) for name in ("separators", "layers", "transparent")}
        return {"available": self.available, **pruned, **{name: value for name, value in more.items() if value}}


FULL = 16
"""Bits that stand for a value that is not quantized, whatever its dtype."""
LATER = ("transparent", "positions", "too_long", "longest", "kv", "checkpoint", "allocation")
"""Fields of a receipt that earlier versions did not have."""


class ReceiptFields(BaseModel):
    """The fields of a receipt.

    Attributes:
        quantization: name of the quantization method; None without quantization.
        pruning: the pruning in words; None without pruning.
        wants_weights: whether the spec asks to quantize weights.
        wants_activations: whether the spec asks to quantize activations.
        linears: one line per linear in the quantized parts.
        images: number of images that were counted.
        available: tokens before pruning, summed over images.
        kept: kept tokens, summed over images.
        merged: tokens made from several, summed over images.
        least: smallest number of tokens (kept + merged) of an image. If tokens are dropped inside the decoder, those
            that its last layer received, or the mean over layers, rounded up, if that layer received none.
        most: largest number of them of an image.
        layers: tokens that each layer of the decoder received, summed over images; empty if all layers receive the
            same.
        fallbacks: what was done otherwise than asked, in words.
        backend: what multiplied: a simulation, or kernels of a library; None without quantization.
        calibration: what calibration used; None for a method that does not calibrate.
        separators: tokens that the model adds itself (new lines between rows of tiles) and that stayed, summed over
            images. They are not part of the budget.
        relevance_sign: which sign of the similarity between image and question counts as relevance, and why; None for a
            pruner that compares no similarity.
        transparent: number of images with transparent pixels.
        positions: number of positions that the decoder was made for; None if it is not known.
        too_long: number of questions whose prompts need more of them, as they are after pruning in front of the
            decoder.
        longest: positions that the longest of these prompts needs; None if there are none.
        checkpoint: what the checkpoint is, in words, if it was quantized already; None if it was not.
        allocation: how bits were allocated to layers; None if they were not, and then not stored.
        kv: what the quantized KV cache held of the first prompt; None if it is in full precision, and then not stored.
    """

    quantization: str | None = None
    pruning: str | None = None
    wants_weights: bool = False
    wants_activations: bool = False
    linears: list[LinearReceipt] = Field(default_factory=list)
    images: int = 0
    available: int = 0
    kept: int = 0
    merged: int = 0
    least: int | None = None
    most: int | None = None
    layers: list[int] = Field(default_factory=list)
    fallbacks: list[str] = Field(default_factory=list)
    backend: str | None = None
    calibration: CalibrationUse | None = None
    separators: int = 0
    relevance_sign: str | None = None
    transparent: int = 0
    positions: int | None = None
    too_long: int = 0
    longest: int | None = None
    kv: KVUse | None = None
    checkpoint: str | None = None
    allocation: AllocationUse | None = None

    @model_serializer(mode="wrap")
    def _without_later(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain data. Fields that came later are left out where they say nothing, as in receipts that had none."""
        data: dict[str, Any] = dump(self)
        return {name: value for name, value in data.items() if value or name not in LATER}

    @property
    def mean_weight_bits(self) -> float | None:
        """Bits per weight as measured, mean over all weights of the linears in scope; None without any.

        A weight that is not quantized counts with 16 bits; scales and zero points do not count.
        """
        sizes = [math.prod(line.shape) for line in self.linears if line.shape]
        bits = [min(line.weight_bits, FULL) for line in self.linears if line.shape]
        return sum(map(operator.mul, sizes, bits)) / sum(sizes) if sizes else None


class Receipt(ReceiptFields):
    """The receipt that `compress` yields. It fills while the model runs."""

    def saw_image(
        self, available: int, kept: int, merged: int, separators: int = 0, layers: Sequence[int] = ()
    ) -> None:
        """Count one image.

        Args:
            available: number of tokens before pruning.
            kept: number of kept tokens.
            merged: number of tokens made from several.
            separators: number of tokens that the model adds itself and that stayed.
            layers: tokens that each layer of the decoder received, if tokens are dropped inside it.
        """
        budget = kept + merged
        if not budget and layers:  # the last layer received none: what counts is the mean over layers
            budget = -(-sum(layers) // len(layers))
        self.separators += separators
        self.layers = [sum(pair) for pair in itertools.zip_longest(self.layers, layers, fillvalue=0)]
        self.images += 1
        self.available += available
        self.kept += kept
        self.merged += merged
        self.least = budget if self.least is None else min(self.least, budget)
        self.most = budget if self.most is None else max(self.most, budget)

    def recount(self, images: Iterable[ImageTokens], beyond: Sequence[int] = ()) -> None:
        """Count anew, from what was stored with answers, so that those of earlier sessions are counted too.

        Args:
            images: the images of all answers.
            beyond: positions that each prompt needs which is too long for the decoder.
        """
        self.too_long, self.longest = len(beyond), max(beyond, default=None)
        self.images = self.available = self.kept = self.merged = self.separators = self.transparent = 0
        self.least = self.most = None
        self.layers = []
        for image in images:
            kept = image.available if image.kept is None else len(image.kept)
            self.saw_image(image.available, kept, image.merged, image.separators, image.layers)
            self.transparent += image.transparent

    def fall_back(self, what: str) -> None:
        """Note that something was done otherwise than asked. The same note is kept only once."""
        if what not in self.fallbacks:
            self.fallbacks.append(what)

    @property
    def tokens(self) -> dict[str, float | int]:
        """Visual tokens per image, as measured; empty if no image was counted."""
        if not self.images:
            return {}
        n = self.images
        counted: dict[str, float | int] = {
            "images": n,
            "available": self.available / n,
            "mean": (self.kept + self.merged) / n,
            "min": self.least or 0,
            "max": self.most or 0,
            "kept": self.kept / n,
            "merged": self.merged / n,
        }
        if self.layers:
            counted["layer_mean"] = sum(self.layers) / n / len(self.layers)
            counted["mean"] = counted["mean"] or counted["layer_mean"]
        return {**counted, "separators": self.separators / n} if self.separators else counted

    def check(self) -> None:
        """Check that the quantization that the spec asks for reached the matmuls.

        All linears that the method planned must show quantized weights, all of them that were called must show
        quantized activations, and there must be at least one.

        Raises:
            NotQuantizedError: they do not.
        """
        planned = [line for line in self.linears if line.planned]
        if self.wants_weights:
            wanted = [line for line in planned if line.asked is None or line.asked[0] < FULL]
            self._check("weights were", [line for line in wanted if _reached(line.weight_bits, line, 0)], wanted)
        if self.wants_activations:
            called = [line for line in planned if line.calls and (line.asked is None or line.asked[1] < FULL)]
            good = [line for line in called if _reached(line.activation_bits, line, 1)]
            self._check("activations were", good, called)
        if self.kv is not None:
            self.kv.check()

    def _check(self, what: str, good: list[LinearReceipt], of: list[LinearReceipt]) -> None:
        if len(good) == len(of) and good:
            return
        bad = next((line.name for line in of if line not in good), "")
        raise NotQuantizedError(
            f"{self.quantization}: {what} to be quantized, but {len(good)} of {len(of)} linears in use show it"
            + (f"; not {bad}" if bad else "")
        )

    def summary(self) -> str:
        """The receipt in one line, for tables."""
        given = f"as the checkpoint has it: {self.checkpoint}" if self.checkpoint else "full precision"
        parts = [self._quantization_line() if self.quantization else given]
        if self.tokens and self.pruning:
            t = self.tokens
            merged = f" ({t['kept']:g} kept + {t['merged']:g} merged)" if self.merged else ""
            lines = f" and {t['separators']:g} separators" if self.separators else ""
            layers = f" in the last layer, {t['layer_mean']:.4g} on the average of layers" if self.layers else ""
            if self.layers and not self.kept + self.merged:
                layers = " on the average of layers, none in the last"
            parts.append(f"{self.pruning}: {t['mean']:g} of {t['available']:g} tokens{merged}{lines}{layers}")
        if self.transparent:
            parts.append(f"{self.transparent} transparent picture(s)")
        if self.too_long:
            parts.append(f"{self.too_long} prompt(s) beyond {self.positions} positions")
        if self.fallbacks:
            parts.append(f"{len(self.fallbacks)} fallback(s)")
        return "; ".join(parts)

    def _quantization_line(self) -> str:
        pairs = Counter((line.weight_bits, line.activation_bits) for line in self.linears if line.calls)
        several = any(line.asked for line in self.linears)
        counts = {pair: f" at {count}" if several else "" for pair, count in pairs.items()}
        bits = ", ".join(f"W{w}A{a}{counts[w, a]}" for w, a in sorted(pairs, key=str)) or "no linear was called"
        if several:
            by = f", by {self.allocation.method}" if self.allocation else ""
            bits += f" (mean {self.mean_weight_bits:.4g} bits per weight{by})"
        called = sum(1 for line in self.linears if line.calls)
        scope = ", ".join(sorted({line.part for line in self.linears}))
        cache = f"; {self.kv.format}: {self.kv.tokens:.4g} tokens x {self.kv.bits:.3g} bits" if self.kv else ""
        return f"{self.quantization}: {bits} at {called} of {len(self.linears)} linears ({scope}){self._stored}{cache}"

    @property
    def _stored(self) -> str:
        """What packed weights take, in words; empty if none is packed."""
        packed = [line for line in self.linears if line.stored_bytes and line.stored_bits]
        if not packed:
            return ""
        total = sum(line.stored_bytes or 0 for line in packed)
        weights = sum(8 * (line.stored_bytes or 0) / (line.stored_bits or 1) for line in packed)
        return f"; stored packed: {8 * total / weights:.3g} bits per weight, {total / 1e6:,.3f} MB"

    def to_json(self) -> dict[str, Any]:
        """The receipt as plain data, with its summary."""
        return {"summary": self.summary(), **self.model_dump(mode="json")}


def _reached(bits: int | None, line: LinearReceipt, side: int) -> bool:
    """Whether a side of a linear has no more bits than the spec asks for; 0 is the weight, 1 the input."""
    return bits is not None and (bits < FULL if line.asked is None else bits <= line.asked[side])
