"""Quantized weights in the format of compressed-tensors: what a checkpoint says of them, and the tensors it holds.

The names are those of the library's files. A scheme says how weights and inputs of a group of linears are quantized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qapbench.errors import Problem, UserError
from qapbench.methods.floating import MANTISSA, nvfp4_multiplier
from qapbench.methods.formats import Format, LinearFormats
from qapbench.methods.packed import TILE, PackedWeight, unpack
from qapbench.methods.plans import LinearPlan
from qapbench.spec.run_spec import QuantizeSpec

METHOD = "compressed-tensors"
PACKED, WHOLE = "pack-quantized", "int-quantized"  # integers in words of 32 bits; 8-bit integers, one to a byte
WORD = 32  # bits of the integers that codes are packed into
LAYOUTS = {"mxfp4": "mxfp4-pack-quantized", "mxfp8": "mxfp8-quantized", "nvfp4": "nvfp4-pack-quantized"}
"""Layouts of formats that fix their groups."""
SCALES = {"mxfp4": "torch.uint8", "mxfp8": "torch.uint8", "nvfp4": "torch.float8_e4m3fn"}  # dtypes of their scales


def refused(message: str, *where: str) -> UserError:
    """The error for what the format has no place for."""
    return UserError(Problem(f"compressed-tensors cannot store {message}", ("quantize", *where)))


def layout_of(spec: QuantizeSpec) -> str:
    """Name of the format in which the library stores weights that are quantized so.

    Raises:
        UserError: there is none. The message names the field.
    """
    if spec.kv is not None:
        raise refused(f"the KV cache as {spec.kv.label}; leave `kv` out", "kv")
    if spec.allocate is not None:
        raise refused("weights of several numbers of bits so that transformers reads them; leave it out", "allocate")
    asked: list[tuple[LinearFormats, tuple[str, ...]]] = [(LinearFormats(spec.weights, spec.activations), ())]
    asked += [(LinearFormats(one.weights, one.activations), ("overrides", one.linears)) for one in spec.overrides]
    if spec.overrides:
        asked = [(pair, where) for pair, where in asked if any(pair)]
    found: dict[LinearFormats, str] = {}
    for pair, where in asked:
        try:
            found[pair] = _layout_of(*pair)
        except UserError as error:
            raise UserError([Problem(p.message, (p.where[0], *where, *p.where[1:])) for p in error.problems]) from None
    if len({pair.weights for pair in found}) > 1:
        message = (
            "weights of several formats so that transformers reads them, which dequantizes all linears by one; leave "
            "some in full precision (null), or give them other `activations`"
        )
        raise refused(message, "overrides")
    names = set(found.values())
    return names.pop() if len(names) == 1 else PACKED  # inputs that differ: what 8-bit weights can have too


def _layout_of(weights: Format | None, activations: Format | None) -> str:
    """Name of the format in which the library stores weights that are quantized so."""
    if weights is None:
        raise refused("weights that are not quantized; give `weights`", "weights")
    if weights.format == "nvfp4" and weights.scale != "compressed_tensors":
        message = f"nvfp4 weights with the rule {weights.scale} to the bit; write `scale: compressed_tensors`"
        raise refused(message, "weights", "scale")
    if weights.granularity == "channel" or (weights.format == "int" and weights.granularity != "row"):
        raise refused(f"weights with scales per {weights.granularity}; take `row`", "weights", "granularity")
    if weights.format == "fp8" and weights.granularity == "row" and weights.group_size is not None:
        raise refused("fp8 weights in groups of a row; leave `group_size` out", "weights", "group_size")
    if activations is not None:
        _check_activations(weights, activations)
    if weights.format in LAYOUTS:
        return LAYOUTS[weights.format]
    if weights.format == "fp8":
        return "float-quantized"
    whole = weights.bits == 8 and weights.group_size is None and weights.symmetric
    return WHOLE if whole and activations is not None and activations.bits == 8 else PACKED


def _check_activations(weights: Format, activations: Format) -> None:
    """Check that the library computes the same scales of activations, and has a kernel type for the pair."""
    if activations.format == "nvfp4":
        message = "nvfp4 activations, since it fixes the scale of the whole tensor beforehand; leave `activations` out"
        raise refused(message, "activations", "format")
    if activations.format != weights.format:
        raise refused(f"{activations.format} activations beside {weights.format} weights", "activations", "format")
    if activations.granularity != "row":
        raise refused(
            f"activations with scales per {activations.granularity}, since its own span all samples of a batch; take "
            "`row`",
            "activations",
            "granularity",
        )
    if activations.format != "int":
        if activations.format == "fp8" and activations.group_size is not None:
            raise refused("fp8 activations in groups; leave `group_size` out", "activations", "group_size")
        if activations.scale != "compressed_tensors":
            raise refused(
                f"activations with the rule {activations.scale}; write `scale: compressed_tensors`",
                "activations",
                "scale",
            )
    elif activations.symmetric and activations.divisor != "half":
        raise refused(
            f"activations with `divisor: {activations.divisor}`, since it divides by half of all levels; write "
            "`divisor: half`",
            "activations",
            "divisor",
        )
    elif activations.zero_point != "in_range":
        raise refused(
            f"activations with `zero_point: {activations.zero_point}`; leave it out", "activations", "zero_point"
        )


@dataclass(frozen=True)
class Group:
    """The linears of a checkpoint that are quantized alike.

    Attributes:
        formats: their formats.
        linears: their names.
        symmetric: whether their weights have no zero points.
    """

    formats: LinearFormats
    linears: Sequence[str]
    symmetric: bool


def _scheme_of(group: Group, layout: str, targets: Sequence[str]) -> dict[str, Any]:
    """A group of linears, as a checkpoint's config has it."""
    weights, activations = group.formats
    if weights is None:
        raise refused("weights that are not quantized; give `weights`", "weights")
    strategy, more = "channel", dict[str, Any]()
    if weights.granularity == "block":
        side = weights.group_size or 128
        strategy, more = "block", {"block_structure": [side, side]}
    elif weights.granularity == "tensor":
        strategy = "tensor"
    elif weights.group_size is not None:
        kind = "tensor_group" if weights.format == "nvfp4" else "group"
        strategy, more = kind, {"group_size": weights.group_size}
    inputs = None
    if activations is not None:
        size = activations.group_size
        of_inputs = {"strategy": "token"} if size is None else {"strategy": "group", "group_size": size}
        inputs = _arguments(activations, dynamic=True, **of_inputs)
    arguments = _arguments(weights, dynamic=False, strategy=strategy, **more)
    return {
        "targets": list(targets),
        "format": layout,
        "weights": {**arguments, "symmetric": group.symmetric},
        "input_activations": inputs,
        "output_activations": None,
    }


def _arguments(format: Format, **more: Any) -> dict[str, Any]:
    kind = "int" if format.format == "int" else "float"
    scales = {"scale_dtype": SCALES[format.format]} if format.format in SCALES else {}
    return {"num_bits": format.bits, "type": kind, "symmetric": format.symmetric, **scales, **more}


def check_plan(name: str, plan: LinearPlan, method: str) -> None:
    """Check that a plan is nothing but rounded weights and activations in a format.

    Raises:
        UserError: it is more.
    """
    if plan.transform is not None:
        what = f"what {method} does to the input of {name} ({type(plan.transform).__name__})"
        raise refused(f"{what}: take a method that only rounds, such as rtn or gptq", "method")
    if plan.activation is not None and not isinstance(plan.activation, Format):
        what = f"how {method} quantizes the input of {name} ({type(plan.activation).__name__})"
        raise refused(f"{what}: leave `activations` out", "method")


def tensors_of(name: str, weight: PackedWeight, layout: str, method: str, original: Tensor) -> dict[str, Tensor]:
    """The tensors that stand in a checkpoint for the weight of a linear.

    Args:
        name: name of the linear.
        weight: its quantized weight, in host memory.
        layout: name of the format of the checkpoint's weights.
        method: name of the method.
        original: [out, in], what was quantized.

    Raises:
        UserError: its codes or its zero points have no place there.
    """
    rows, width = weight.shape
    if weight.numbers not in ("int", "e4m3", "e2m1"):
        raise refused(f"weights on the levels of {method} ({weight.numbers})", "method")
    grouped = weight.scale.shape[1] > 1 or layout in LAYOUTS.values()
    size = weight.columns if layout not in LAYOUTS.values() else 16 if layout == LAYOUTS["nvfp4"] else 32
    if grouped and width % size and weight.rows == 1:
        raise refused(f"groups of {size} in {name}, whose {width} inputs they do not divide", "weights", "group_size")
    if layout in LAYOUTS.values():
        return _of_blocks(name, weight, layout, method, original)
    scale = weight.scale.flatten() if weight.rows > 1 and weight.columns >= width else weight.scale
    found = {"weight_scale": scale.contiguous()}
    if layout == "float-quantized":
        codes = unpack(weight.codes, weight.bits, torch.empty(rows, width, dtype=torch.uint8))
        return {"weight": codes.view(torch.float8_e4m3fn), **found}
    if weight.zero is None:
        raise refused(f"{name} as integers", "weights", "format")
    half = 2 ** (weight.bits - 1)
    if layout == WHOLE:
        codes = unpack(weight.codes, weight.bits, torch.empty(rows, width, dtype=torch.uint8))
        if weight.zero.numel() != 1:
            raise refused(f"the levels of {method}, which are not symmetric", "method")
        return {"weight": (codes.to(torch.int16) - half).to(torch.int8), **found}
    found |= {"weight_packed": words(weight), "weight_shape": torch.tensor([rows, width])}
    if weight.zero.numel() > 1 or weight.zero.item() != half:
        zero = weight.zero.int().expand(weight.scale.shape)
        if not bool(((zero >= 0) & (zero < 2 * half)).all()):
            raise refused(f"zero points of {name} that are no codes", "weights", "zero_point")
        found["weight_zero_point"] = _words(zero.to(torch.uint8).mT.contiguous(), weight.bits).mT.contiguous()
    return found


def _of_blocks(name: str, weight: PackedWeight, layout: str, method: str, original: Tensor) -> dict[str, Tensor]:
    """The tensors of a weight in a floating-point format with scales of few bits for each group."""
    rows, width = weight.shape
    if layout == LAYOUTS["nvfp4"]:
        found = _two_scales(weight.scale, original)
        if found is None:
            raise refused(f"the scales that {method} gives {name}, which are no E4M3 numbers", "method")
        block, whole = found
        return {
            "weight_packed": words(weight).view(torch.uint8),
            "weight_scale": block,
            "weight_global_scale": whole,
        }
    bits = weight.scale.view(torch.int32)
    exponent = bits >> MANTISSA  # that of 2^-127, the least scale, is 0 too
    least = (exponent == 0) & (bits == 1 << (MANTISSA - 1))
    if not bool((least | ((exponent > 0) & (exponent < 255) & (bits == exponent << MANTISSA))).all()):
        raise refused(f"the scales that {method} gives {name}, which are no powers of two", "method")
    found_scale = {"weight_scale": exponent.to(torch.uint8)}
    if layout == LAYOUTS["mxfp4"]:
        return {"weight_packed": words(weight).view(torch.uint8), **found_scale}
    codes = unpack(weight.codes, weight.bits, torch.empty(rows, width, dtype=torch.uint8))
    return {"weight": codes.view(torch.float8_e4m3fn), **found_scale}


def _two_scales(scale: Tensor, original: Tensor) -> tuple[Tensor, Tensor] | None:
    """The scales of NVFP4 as a file has them: E4M3 numbers [out, groups], and a float32 number [1] that divides them.

    Args:
        scale: float32 [out, groups], their quotients.
        original: the weight, whose largest magnitude gives the divisor.

    Returns:
        None if there are none with these quotients.
    """
    most = original.detach().abs().amax().cpu()
    for dtype in (original.dtype, torch.float32):  # methods that change a weight first do so in float32
        up = nvfp4_multiplier(most, dtype).reshape(1)
        block = (scale * up).to(torch.float8_e4m3fn)
        if torch.equal(block.float() / up, scale):
            return block, up
    return None


def words(weight: PackedWeight) -> Tensor:
    """Codes [out, in] bit after bit in 32-bit integers: int32 [out, ceil(in * bits / 32)]."""
    rows, width = weight.shape
    step, parts = max(1, TILE // max(1, width)), []
    for start in range(0, rows, step):
        some = weight.codes[start : start + step].cpu()
        parts.append(_words(unpack(some, weight.bits, torch.empty(len(some), width, dtype=torch.uint8)), weight.bits))
    return torch.cat(parts)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes [R, W] below 2^bits, the first one in the lowest bits: int32 [R, ceil(W * bits / 32)]."""
    each = np.unpackbits(codes.numpy()[..., None], axis=-1, count=bits, bitorder="little").reshape(len(codes), -1)
    padded = np.pad(each, ((0, 0), (0, -each.shape[1] % WORD)))
    return torch.from_numpy(np.packbits(padded, axis=-1, bitorder="little").view("<i4").copy())


def config_of(groups: Sequence[Group], layout: str, ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint.

    Args:
        groups: the linears that are quantized, by their formats.
        layout: name of the format of their weights.
        ignored: names of linears that are not quantized.
    """
    several = len(groups) > 1
    schemes = [_scheme_of(one, layout, one.linears if several else ["Linear"]) for one in groups]
    return {
        "quant_method": METHOD,
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": scheme for index, scheme in enumerate(schemes)},
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def linears_left(model: nn.Module, quantized: set[str]) -> list[str]:
    """Names of the linears of a model that are not among the quantized ones."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in quantized]
