"""Checkpoints that are quantized already, in the format of compressed-tensors: what they are, and how they are loaded.

The weights are dequantized while they are read. What the checkpoint says of the inputs of its linears is done by hooks,
with the library's own rules for scales.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import safe_open
from torch import Tensor, nn

from qapbench.errors import Problem, UserError
from qapbench.methods.affine import Grid
from qapbench.methods.floating import E2M1, E4M3, FloatGrid, FloatLevels, fake_quantize_float
from qapbench.methods.formats import Format
from qapbench.spec.run_spec import RunSpec

METHOD = "compressed-tensors"
EXTRA = "pip install 'qapbench[compressed-tensors]'"
ANYWHERE = ("model", "language_model")  # parts of a name whose order differs between files and models

_described: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section of a config.json that says how the checkpoint is quantized; None if it is not, or by other means."""
    found = config.get("quantization_config")
    is_ours = isinstance(found, Mapping) and found.get("quant_method") == METHOD and found.get("config_groups")
    return found if is_ours else None


def describe(section: Mapping[str, Any]) -> str:
    """What a checkpoint is, in a few words: "compressed-tensors pack-quantized W4A16 g128"."""
    kinds = []
    for group in section["config_groups"].values():
        weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
        kind = f"W{weights.get('num_bits', 16)}A{inputs.get('num_bits', 16)}"
        if weights.get("type") == "float":
            kind += " float"
        kinds.append(kind + (f" g{weights['group_size']}" if (weights.get("group_size") or 0) > 0 else ""))
    return f"{METHOD} {section.get('format', '')} {', '.join(dict.fromkeys(kinds))}"


def described(model: nn.Module) -> str | None:
    """What a loaded model's checkpoint is, if it was quantized already; None if it was not."""
    return _described.get(model)


def check_not_twice(spec: RunSpec, config: Mapping[str, Any]) -> None:
    """Check that a run does not quantize what is quantized already.

    Raises:
        UserError: it does.
    """
    section = quantization_of(config)
    if section is not None and spec.quantize is not None:
        what = f"{spec.model} is quantized already ({describe(section)})"
        message = f"{what}; leave `quantize` out, or name a model in full precision"
        raise UserError(Problem(message, ("quantize",)))


def loading_arguments(folder: Path, config: Mapping[str, Any], trust_remote_code: bool = False) -> dict[str, Any]:
    """What `from_pretrained` needs, so that the weights of a checkpoint with this config are dequantized.

    Args:
        folder: folder of the checkpoint.
        config: content of its config.json.
        trust_remote_code: let the checkpoint run its own Python code.

    Raises:
        UserError: compressed-tensors is not installed.
    """
    if quantization_of(config) is None:
        return {}
    try:
        import compressed_tensors  # noqa: F401
    except ImportError:
        message = f"the checkpoint is quantized, and compressed-tensors is not installed: {EXTRA}"
        raise UserError(Problem(message, ("model",))) from None
    kinds = {
        json.dumps(group.get("weights"), sort_keys=True)
        for group in config["quantization_config"]["config_groups"].values()
    }
    if len(kinds) > 1:
        what = f"{len(kinds)} groups of linears whose weights are quantized differently"
        raise UserError(
            Problem(f"the checkpoint has {what}, and transformers dequantizes all by one of them", ("model",))
        )
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    read.quantization_config = {**read.quantization_config, "dequantize": True}
    return {"config": read}


def complete(model: nn.Module, folder: Path, config: Mapping[str, Any]) -> None:
    """Quantize the inputs of a loaded model's linears as its checkpoint says, and note what the checkpoint is.

    Raises:
        UserError: it says something that is not known here.
    """
    section = quantization_of(config)
    if section is None:
        return
    from compressed_tensors.utils import match_named_modules

    _described[model] = describe(section)
    scales: dict[tuple[str, ...], dict[str, Tensor]] | None = None
    for group in section["config_groups"].values():
        inputs = group.get("input_activations")
        if not inputs:
            continue
        for name, module in match_named_modules(model, group["targets"], section.get("ignore") or []):
            if not isinstance(module, nn.Linear):
                continue
            own: Mapping[str, Tensor] = {}
            if inputs.get("dynamic") is not True:
                scales = _input_scales(folder) if scales is None else scales
                own = scales.get(_place(name), {})
            rounding = rounding_of(inputs, own, name)
            module.register_forward_pre_hook(_hook(rounding))


def _hook(rounding: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Any, ...]]:
    return lambda module, args: (rounding(args[0]), *args[1:])


def rounding_of(inputs: Mapping[str, Any], own: Mapping[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
    """How the input of a linear is quantized.

    Args:
        inputs: the section on input activations.
        own: what the checkpoint has for this linear: "input_scale", "input_zero_point", "input_global_scale".
        name: name of the linear.

    Raises:
        UserError: it is not known here, or a scale is missing.
    """
    bits, kind, strategy = inputs.get("num_bits", 8), inputs.get("type", "int"), inputs.get("strategy")
    symmetric, dynamic, size = inputs.get("symmetric", True), inputs.get("dynamic"), inputs.get("group_size")
    if dynamic is True and strategy == "group" and kind == "float" and "uint8" in str(inputs.get("scale_dtype")):
        if (bits, size) in ((4, 32), (8, 32)):
            return Format.model_validate({"format": f"mxfp{bits}", "scale": "compressed_tensors"})
    elif dynamic is True and strategy in ("token", "group", "tensor") and (kind, bits) in ((kind, 8), ("int", bits)):
        shared: dict[str, Any] = {"granularity": "tensor" if strategy == "tensor" else "row"}
        shared |= {"group_size": size if strategy == "group" else None}
        if kind == "float":
            return Format.model_validate({"format": "fp8", "scale": "compressed_tensors", **shared})
        return Format(bits=bits, symmetric=symmetric, divisor="half" if symmetric else "qmax", **shared)
    if dynamic == "local" and (kind, bits, size) == ("float", 4, 16) and "input_global_scale" in own:
        whole = E4M3.top * E2M1.top / own["input_global_scale"].float().reshape(1, 1)
        levels = FloatLevels("nvfp4", "compressed_tensors", whole)
        return lambda x: fake_quantize_float(x, levels.within(whole.to(x.device)), 16)
    if not dynamic and strategy == "tensor" and "input_scale" in own:
        scale = own["input_scale"].float().flatten()
        if kind == "float" and bits == 8:
            return lambda x: FloatGrid(E4M3, scale.to(x.device), scale.to(x.device))(x)
        if kind == "int":
            half = 2 ** (bits - 1)
            zero = own.get("input_zero_point", torch.zeros(1)).float().flatten()
            return lambda x: Grid(scale.to(x.device), zero.to(x.device), -half, half - 1)(x)
    message = (
        f"the inputs of {name} are quantized to {bits}-bit {kind} per {strategy}, dynamic: {dynamic}, and qapbench "
        "knows int and 8-bit float per token, group or tensor, static scales per tensor, MX formats and NVFP4"
    )
    raise UserError(Problem(message, ("model",)))


def _input_scales(folder: Path) -> dict[tuple[str, ...], dict[str, Tensor]]:
    """The static scales of inputs in a checkpoint, by the place of their linear."""
    found: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  (the file is not a dict)
                owner, _, last = key.rpartition(".")
                if last.startswith("input_"):
                    found.setdefault(_place(owner), {})[last] = file.get_tensor(key)
    return found


def _place(name: str) -> tuple[str, ...]:
    """A module's name without the parts whose order differs between files and models."""
    return tuple(part for part in name.split(".") if part not in ANYWHERE)
