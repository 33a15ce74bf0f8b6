"""Loads checkpoints: the model, its processor, its config, and the precision that a spec stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, get_args

import torch
from torch import nn

from qapbench.checkpoints.find import HASHES, find_checkpoint
from qapbench.checkpoints.json_files import read_mapping, why_not_loaded
from qapbench.errors import Problem, UserError
from qapbench.memory import give_back_freed
from qapbench.models.checkpoint_format import format_of
from qapbench.models.compressed import check_not_twice, complete, loading_arguments, quantization_of
from qapbench.models.family import family_class, family_of
from qapbench.models.placement import Placement, enter_at, is_spread, place, shrunk, skeleton, spread
from qapbench.models.streaming import streaming
from qapbench.models.unread import Postponed, in_a_layer, narrow
from qapbench.spec.quantize_spec import Scope
from qapbench.spec.run_spec import RunSpec


def load_model(
    spec: RunSpec,
    device: torch.device,
    trust_remote_code: bool = False,
    offload: bool = False,
    devices: Sequence[torch.device] = (),
) -> tuple[Any, Any]:
    """Load the model of a spec, in eval mode on a device or spread over several, and its processor.

    The checkpoint is read tensor by tensor: beside the model no more than a few tensors are in memory. If the spec
    stores quantized weights packed, the linears that it quantizes have weights that stay in their files until something
    computes with them, and other matrices take no more memory than in a file of 16 bits (`models.unread`).

    Args:
        spec: names the model and its dtype, and says which linears are stored packed.
        device: device for the model.
        trust_remote_code: let the checkpoint run its own Python code.
        offload: leave all linears of the decoder's layers in their files, and hold other matrices likewise.
        devices: devices that share the model, `device` the first of them, and that leave what they have no room for in
            its files; if empty, `device` has all of it.

    Returns:
        (model, processor)

    Raises:
        UserError: the checkpoint cannot be loaded as an image-text-to-text model, or does not fit on the devices.
    """
    from transformers import AutoModelForImageTextToText

    folder, config, dtype = find_checkpoint(spec.model).folder, read_config(spec), precision(spec, device)
    if (folder / HASHES).is_file():
        what = f"{folder} stands for a model that was loaded in Python, and holds no weights: use run(model=...) again"
        raise UserError(Problem(what, ("model",)))
    check_not_twice(spec, config)
    scope = left_in_files(spec, device, config, offload)
    several = len(devices) > 1
    if several and quantization_of(config) is not None:
        what = "--device-map spreads the weights of a checkpoint, and this one is quantized already; leave it out"
        raise UserError(Problem(what, ("model",)))

    placement = Placement({})
    if devices and not format_of(config) and quantization_of(config) is None:
        outline = skeleton(folder, getattr(torch, dtype), trust_remote_code)
        shrunk(outline, scope, spec)
        may = "language" not in scope and may_leave(spec, device, config)
        placement = place(outline, devices, [*filter(in_a_layer, outline.linears(["language"]))] if may else [])

    def load(postponed: Postponed | None) -> tuple[Any, Any]:
        placed = loading_arguments(folder, config, trust_remote_code)
        with streaming(postponed):
            if layout := format_of(config):
                return layout(folder, config).load(dtype)
            family = family_class(str(config.get("model_type")))
            if several:
                placed["device_map"] = dict(placement.devices)
            elif device.type != "cpu" and find_spec("accelerate"):
                placed["device_map"] = {"": device}
            model = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, **placed
            )
            return model, family.load_processor(folder, trust_remote_code)

    def put(model: Any) -> Any:
        model = model.eval().requires_grad_(False)
        if not several:
            return model.to(device)
        if not is_spread(model):  # one that was put together in host memory
            spread(model, place(family_of(model), devices).devices)
        enter_at(model, device)
        return model

    def waiting(model: Any) -> list[nn.Linear]:
        """The linears whose weights stay in their files."""
        family = family_of(model)
        found = {**family.linears(scope), **{name: family.model.get_submodule(name) for name in placement.left}}
        return list(found.values())

    postponed = Postponed(getattr(torch, dtype), None if several else device) if scope or placement.left else None
    try:
        model, processor = load(postponed)
        model = put(model)
        if postponed is not None and not postponed.settle(model, waiting(model)):
            model, processor = load(None)
            model = put(model)
        if scope:
            narrow(model, family_of(model).linears(scope).values())
            give_back_freed()
    except UserError:
        raise
    except Exception as error:  # OSError, SafetensorError, ImportError and others: no common base
        raise why_not_loaded(folder, error) from error
    complete(model, folder, config)
    family_of(model).complete(processor)
    return model, processor


def left_in_files(spec: RunSpec, device: torch.device, config: Mapping[str, Any], offload: bool) -> list[Scope]:
    """Parts of the model whose layers have linears that stay in their files when the model is loaded.

    These are the linears that a run stores packed, until they are packed, and with `offload` those of the decoder. None
    do where the model is put together in host memory before it goes to a GPU.

    Args:
        spec: the run.
        device: device of the model.
        config: content of the checkpoint's config.json.
        offload: whether the decoder stays in its files.

    Raises:
        UserError: the decoder is to stay in its files, and cannot.
    """
    if why := _why_all_is_read(device, config):
        if offload:
            raise UserError(Problem(f"--offload has no effect on this model, because {why}; leave it out", ("model",)))
        return []
    packed = spec.quantize.scope if spec.quantize is not None and spec.packs else []
    decoder: list[Scope] = ["language"] if offload else []
    return sorted({*packed, *decoder}, key=get_args(Scope).index)


def may_leave(spec: RunSpec, device: torch.device, config: Mapping[str, Any]) -> bool:
    """Whether linears of the decoder may stay in their files where devices have no room for them, though nobody asked:
    the run computes with them as they are.

    The arguments are those of `left_in_files`.
    """
    return not spec.quantizes("language") and _why_all_is_read(device, config) is None


def _why_all_is_read(device: torch.device, config: Mapping[str, Any]) -> str | None:
    """Why all weights of a checkpoint are read when it is loaded; None if some may stay in their files."""
    if quantization_of(config) is not None:
        return "it is quantized already, and its weights are computed as they are read"
    if device.type != "cpu" and format_of(config):
        return f"a checkpoint in its authors' layout is put together in host memory before it goes to {device.type}"
    if device.type != "cpu" and find_spec("accelerate") is None:
        return f"without the package accelerate it is put together in host memory before it goes to {device.type}"
    return None


def load_processor(spec: RunSpec, device: torch.device, trust_remote_code: bool = False) -> Any:
    """Load the processor of a spec's model, as far as prompts and scoring need it.

    Args:
        spec: names the model.
        device: device for a model that has to be loaded for its processor.
        trust_remote_code: let the checkpoint run its own Python code.

    Raises:
        UserError: it cannot be loaded.
    """
    folder, config = find_checkpoint(spec.model).folder, read_config(spec)
    if format_of(config):
        return load_model(spec, device, trust_remote_code)[1]  # its processor is made with the model
    try:
        return family_class(str(config.get("model_type"))).load_processor(folder, trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # the same errors as in load_model
        raise why_not_loaded(folder, error) from error


def precision(spec: RunSpec, device: torch.device) -> str:
    """Name of the dtype that the spec's model is loaded in.

    "auto" is the checkpoint's own dtype on a GPU, and float32 on a CPU.
    """
    if spec.dtype != "auto":
        return spec.dtype
    if device.type == "cpu":
        return "float32"
    config = read_config(spec)
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def read_config(spec: RunSpec, fetch: bool = True) -> dict[str, Any]:
    """The config.json of the spec's checkpoint.

    Args:
        spec: names the model.
        fetch: whether the checkpoint may be downloaded.

    Raises:
        UserError: the file cannot be read, or is no mapping.
    """
    return read_mapping(find_checkpoint(spec.model, "model", fetch).folder / "config.json")
