"""What a run reads: the model in memory, and the content hashes of everything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qapbench.checkpoints import digest_file, digest_tree, find_checkpoint
from qapbench.errors import Problem, UserError, first_line
from qapbench.models.family import default_tower, family_class, family_of
from qapbench.models.layouts import layout_of
from qapbench.models.relevance import QuestionReader, find_tower
from qapbench.registry import Entry
from qapbench.spec import RunSpec
from qapbench.strategy import fusions, metrics, pruners, ptqs


def load_model(spec: RunSpec, device: torch.device, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """(model in eval mode on the device, processor).

    Raises:
        UserError: the checkpoint cannot be loaded as an image-text-to-text model.
    """
    from transformers import AutoModelForImageTextToText

    folder, config, dtype = find_checkpoint(spec.model).folder, read_config(spec), precision(spec, device)
    try:
        if layout := layout_of(config):
            model, processor = layout(folder, config).load(dtype)
        else:
            family = family_class(str(config.get("model_type")))
            model = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
            )
            processor = family.load_processor(folder, trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, SafetensorError, RuntimeError, ImportError: no common base
        raise UserError(Problem(f"cannot load {folder}: {first_line(error)}", ("model",))) from error
    model = model.eval().requires_grad_(False).to(device)
    family_of(model).complete(processor)
    return model, processor


def load_processor(spec: RunSpec, device: torch.device, trust_remote_code: bool = False) -> Any:
    """The processor without its model, as far as prompts and scoring need it.

    Raises:
        UserError: it cannot be loaded.
    """
    folder, config = find_checkpoint(spec.model).folder, read_config(spec)
    if layout_of(config):
        return load_model(spec, device, trust_remote_code)[1]  # such a folder holds none: it is made with the model
    try:
        return family_class(str(config.get("model_type"))).load_processor(folder, trust_remote_code)
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(Problem(f"cannot load {folder}: {first_line(error)}", ("model",))) from error


def precision(spec: RunSpec, device: torch.device) -> str:
    """The dtype that "auto" comes to: the checkpoint's own on a GPU, float32 on a CPU."""
    if spec.dtype != "auto":
        return spec.dtype
    if device.type == "cpu":
        return "float32"
    config = read_config(spec)
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def read_config(spec: RunSpec, fetch: bool = True) -> dict[str, Any]:
    """The checkpoint's config.json."""
    file = find_checkpoint(spec.model, "model", fetch).folder / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(Problem(f"{file} cannot be read: {first_line(error)}", ("model",))) from error


def fingerprints(
    spec: RunSpec, data: str, device: torch.device, fetch: bool = True, calibration: str = ""
) -> dict[str, str]:
    """Content hashes of all that a run reads: the spec's names and paths may change, these say what was there.

    Args:
        calibration: hash of what calibration samples are drawn from; "" where there is no calibration.
    """
    folder = find_checkpoint(spec.model, "model", fetch).folder
    config = read_config(spec, fetch)
    found = {"model": digest_tree(folder), "data": data, "precision": f"{precision(spec, device)} on {device.type}"}
    if calibration:
        found["calibration"] = calibration
    if layout := layout_of(config):
        found["vision tower"] = digest_tree(layout(folder, config).companion(fetch))
    for kind, entry in used_items(spec):
        if entry.source and entry.source.is_file():
            found[f"{kind} {entry.name}"] = digest_file(entry.source)
    for index, plugin in enumerate(spec.plugins):
        found[f"plugin {index} {Path(plugin).name}"] = digest_file(Path(plugin))
    if needs_tower(spec):
        tower, reason = find_tower(spec.text_tower, str(folder), default_tower(config), fetch)
        found["text_tower"] = digest_tree(tower) if tower else f"none: {reason}"
    return found


def needs_tower(spec: RunSpec) -> bool:
    """Whether the pruner weighs the question in a joint space."""
    if spec.prune is None:
        return False
    needs = pruners.create(spec.prune.method.name, **spec.prune.method.params).needs
    return bool(needs & QuestionReader.FIELDS - {"prompt_embeds"})


def used_items(spec: RunSpec) -> list[tuple[str, Entry[Any]]]:
    """The registered items that a run uses, by kind."""
    items: list[tuple[Any, Any]] = []
    if spec.quantize:
        items.append((ptqs, spec.quantize.method))
    if spec.prune:
        items += [(pruners, spec.prune.method), (metrics, spec.prune.sensitivity), (fusions, spec.prune.fusion)]
    return [(registry.kind, registry.entry(item.name)) for registry, item in items if item]
