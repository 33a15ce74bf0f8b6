"""In how many bits linears, attention and the KV cache are held, and how many bytes that takes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qapbench.methods.formats import Format, LinearFormats
from qapbench.methods.kinds import ptqs
from qapbench.methods.kv import KVFormat
from qapbench.methods.quantization import PTQ
from qapbench.receipt import LinearReceipt
from qapbench.spec.run_spec import QuantizeSpec

from .shape import ModelShape, Product
from .work import FULL, Precision

SHARED_SCALE = {"mxfp8": 1, "mxfp4": 1, "nvfp4": 1}  # bytes of the scale of a group
TENSOR_SCALE = {"nvfp4": 4}  # bytes of the scale of a whole weight, beside those of its groups


@dataclass(frozen=True)
class Bits:
    """The formats of a quantized model.

    Attributes:
        quantize: the `quantize` section; None for full precision.
        measured: what a receipt says of each linear, by name; empty where nothing was measured. It goes before the
            section, since a method may leave linears out.
    """

    quantize: QuantizeSpec | None = None
    measured: Mapping[str, LinearReceipt] | None = None

    def formats(self, product: Product) -> LinearFormats:
        """The formats that the spec asks of a linear; none of either side outside its scope.

        Bits that are allocated count with their mean until a receipt says which a linear has got.
        """
        spec = self.quantize
        if spec is None or product.part not in spec.scope:
            return LinearFormats(None, None)
        if spec.allocate and not any(one.fits(product.name) for one in spec.overrides):
            line = (self.measured or {}).get(product.name)
            return spec.formats_with(spec.mean_bits if line is None else line.weight_bits)
        return spec.formats_of(product.name)

    def stored(self, product: Product) -> Format | None:
        """The format that a linear's weight is stored in; None if it is not quantized."""
        line = (self.measured or {}).get(product.name)
        return None if line is not None and line.weight_bits >= FULL else self.formats(product).weights

    def of(self, product: Product) -> Precision:
        """Precision of a linear's product."""
        if self.quantize is None or product.part not in self.quantize.scope:
            return Precision()
        formats = self.formats(product)
        weights, activations = formats.bits
        line = (self.measured or {}).get(product.name)
        if line is not None:
            weights, activations = (min(bits or FULL, FULL) for bits in (line.weight_bits, line.activation_bits))
        floating = all(one is None or one.format != "int" for one in formats)
        return Precision(weights, activations, floating)

    def online_flops(self, product: Product) -> int:
        """FLOPs per token of the method's transforms at a linear while the model runs."""
        kind = self.of(product)
        if self.method is None or min(kind.weights, kind.activations) == FULL:  # the method leaves it as it is
            return 0
        return self.method.online_flops(product.name, product.inward, product.outward, product.of_norm)

    @functools.cached_property
    def method(self) -> PTQ | None:
        """The method; None for full precision."""
        item = self.quantize.method if self.quantize else None
        return ptqs.create(item.name, **item.params) if item else None

    @property
    def kv(self) -> KVFormat | None:
        """Format of the KV cache; None if it is in the model's dtype."""
        return self.quantize.kv if self.quantize else None

    def attention(self, prefill: bool) -> tuple[Precision, Precision]:
        """Precisions of the product with the keys and of the one with the values.

        Args:
            prefill: whether it is the attention over the prompt, which may read what was computed.
        """
        if self.kv is None or (prefill and self.kv.prefill == "exact"):
            return Precision(), Precision()
        sides = self.kv.keys, self.kv.values
        keys, values = (Precision(FULL if one is None else one.bits, FULL) for one in sides)
        return keys, values


def weight_bytes(shape: ModelShape, bits: Bits) -> dict[str, int]:
    """Bytes of every stored weight, by name.

    A quantized weight is counted as `stored_bytes`; everything else has the bytes that it has in a safetensors file.
    """
    found = {name: count * size for name, (count, size) in shape.tensors.items()}
    for product in shape.products:
        name = f"{product.name}.weight"
        if (format := bits.stored(product)) is not None:
            found[name] = stored_bytes(format, product.outward, product.inward, shape.value_bytes)
    return found


def stored_bytes(format: Format, rows: int, columns: int, value_bytes: int) -> int:
    """Bytes of a weight [rows, columns] in some format: packed levels, scales and zero points.

    Levels of a row fill whole bytes. A scale is a value of the model's dtype, except those that a floating-point format
    fixes: E8M0 or E4M3, one byte each, and a float32 per weight for NVFP4. A zero point of an integer format has as
    many bits as a level, and those of a column of groups are packed together.

    Args:
        format: the format.
        rows: output channels.
        columns: input channels.
        value_bytes: bytes of a value of the model's dtype.
    """
    levels = rows * math.ceil(columns * format.bits / 8)
    size = format.group_size or columns
    down, across = {
        "row": (rows, math.ceil(columns / size)),
        "channel": (1, columns),
        "tensor": (1, 1),
        "block": (math.ceil(rows / size), math.ceil(columns / size)),
    }[format.granularity]
    scales = down * across * SHARED_SCALE.get(format.format, value_bytes) + TENSOR_SCALE.get(format.format, 0)
    zero_points = 0 if format.symmetric else across * math.ceil(down * format.bits / 8)
    return levels + scales + zero_points


def kv_bytes(shape: ModelShape, bits: Bits, columns: Sequence[float]) -> float:
    """Bytes of the KV cache of one sequence, states of linear attention among them.

    Args:
        shape: the model.
        bits: its formats.
        columns: for each layer, the number of tokens in its cache.
    """
    full = 8 * shape.value_bytes
    sides = (None, None) if bits.kv is None else (bits.kv.keys, bits.kv.values)
    total = 0.0
    for count, linear in zip(columns, shape.linear, strict=True):
        if linear is not None:
            total += linear.held(shape.value_bytes)
            continue
        for side in sides:
            quantized = 0 if side is None or bits.kv is None else bits.kv.stored(side, int(count))
            each = full if side is None else side.stored_bits(shape.key_heads, quantized, shape.head_width, full)
            held = quantized * each + (count - quantized) * full
            total += held * shape.key_heads * shape.head_width / 8
    return total


def measured_lines(lines: Iterable[LinearReceipt]) -> dict[str, LinearReceipt]:
    """The lines of a receipt by the name of their linear."""
    return {line.name: line for line in lines}
