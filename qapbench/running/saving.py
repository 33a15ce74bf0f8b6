"""Writes a quantized model as a checkpoint that transformers and vLLM read (compressed-tensors)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qapbench.checkpoints.find import find_checkpoint
from qapbench.checkpoints.json_files import read_mapping
from qapbench.compression import plans_of
from qapbench.errors import Problem, UserError
from qapbench.methods.formats import by_formats
from qapbench.models.checkpoint_format import format_of
from qapbench.models.loading import precision, read_config
from qapbench.models.unread import values
from qapbench.quantize import export
from qapbench.quantize.packed import packed_weight
from qapbench.spec.run_spec import RunSpec

from .planner import Planner
from .session import Session

SHARD = 4 * 10**9  # bytes of a file of weights, at most
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json", ".bin.index.json")


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written.

    Attributes:
        folder: where it is.
        layout: name of the format of its weights.
        linears: number of quantized linears.
        bits: bits per weight of these, with scales and zero points.
        nbytes: bytes of all tensors.
    """

    folder: Path
    layout: str
    linears: int
    bits: float
    nbytes: int


def check_saving(spec: RunSpec, folder: Path, device: torch.device) -> str:
    """Check, without loading the model, that the quantized model of a run can be written to a folder.

    Args:
        spec: the run.
        folder: folder of the checkpoint.
        device: device of the model.

    Returns:
        Name of the format of its weights.

    Raises:
        UserError: it cannot; the message names the field.
    """
    if spec.quantize is None:
        raise UserError(Problem("there is nothing to quantize; give a `quantize` section", ("quantize",)))
    if spec.quantize.backend != "simulate":
        raise UserError(Problem("the weights of a kernel are not written; leave it out", ("quantize", "backend")))
    if format_of(read_config(spec)):
        message = f"{spec.model} is laid out in a way of its own; convert it to the layout of transformers first"
        raise UserError(Problem(message, ("model",)))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder}: there is something already; name a new folder")
    layout = export.layout_of(spec.quantize)
    if layout == export.LAYOUTS["nvfp4"] and precision(spec, device) != "bfloat16":
        message = (
            f"nvfp4 weights in {precision(spec, device)}: the library reads them in bfloat16; write `dtype: bfloat16`"
        )
        raise UserError(Problem(f"compressed-tensors cannot store {message}", ("dtype",)))
    return layout


def save_quantized(spec: RunSpec, folder: Path, session: Session) -> Saved:
    """Quantize the model of a run, and write it whole or not at all.

    Args:
        spec: the run; its pruning matters only where calibration prunes.
        folder: folder of the checkpoint, which is made.
        session: loads the model and its calibration samples.

    Raises:
        UserError: the format cannot express what the run asks for; the message names the field.
    """
    layout, asked = check_saving(spec, folder, session.settings.device), spec.quantize
    if asked is None:  # which `check_saving` has refused
        raise UserError(Problem("there is nothing to quantize; give a `quantize` section", ("quantize",)))
    method = asked.method.name
    # Weights are packed as they come from the files.
    spec = spec.model_copy(update={"quantize": asked.model_copy(update={"storage": "packed"})})
    model, _ = session.model(spec)
    samples = None
    if asked.calibration is not None:
        samples = session.calibration(Planner(session.settings.runs, session.settings.device).plan(spec))
    linears, plans = plans_of(model, spec, samples)
    formats = asked.formats(linears)
    found: dict[str, dict[str, Tensor]] = {}
    for name, plan in plans.items():
        export.check_plan(name, plan, method)
        weight = values(linears[name].weight)
        packed = packed_weight(plan, weight, name, method).to("cpu")
        found[name] = export.tensors_of(name, packed, layout, method, weight)
    if not found:
        raise UserError(Problem(f"{method} quantizes no linear of this model", ("quantize", "scope")))
    groups = []
    for pair, names in by_formats(found, formats).items():
        zeros = ["weight_zero_point" in found[name] for name in names]
        if any(zeros) and not all(zeros):
            raise export.refused("linears of which only some have zero points", "weights", "symmetric")
        groups.append(export.Group(pair, names, symmetric=not any(zeros)))
    config = read_mapping(find_checkpoint(spec.model).folder / "config.json")
    config["quantization_config"] = export.config_of(groups, layout, export.linears_left(model, set(found)))
    config["dtype"] = precision(spec, session.settings.device)
    config.pop("torch_dtype", None)
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        draft.mkdir(parents=True)
        nbytes = _write(_tensors(model, found), draft)
        _copy_others(find_checkpoint(spec.model).folder, draft)
        (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    weights = sum(linears[name].weight.numel() for name in found)
    stored = sum(tensor.nbytes for tensors in found.values() for tensor in tensors.values())
    return Saved(folder, layout, len(found), 8 * stored / weights, nbytes)


def _tensors(model: Any, found: dict[str, dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the checkpoint by name. A tensor that several names share has the first."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for key, tensor in model.state_dict().items():
        owner, _, last = key.rpartition(".")
        if last == "weight" and owner in found:
            yield from ((f"{owner}.{name}", value) for name, value in found[owner].items())
        elif (place := (tensor.data_ptr(), tuple(tensor.shape))) not in seen:
            seen.add(place)
            yield key, tensor.detach().to("cpu").contiguous()


def _write(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> int:
    """Write tensors in files of limited size, with an index if there are several; returns their bytes."""
    places: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    total = size = 0

    def close() -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(held, folder / name, {"format": "pt"})
        places.update(dict.fromkeys(held, name))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > SHARD:
            close()
            size = 0
        held[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    close()
    if len(names := set(places.values())) == 1:
        (folder / names.pop()).rename(folder / "model.safetensors")
    else:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return total


def _copy_others(source: Path, folder: Path) -> None:
    """Copy what a checkpoint holds besides weights and config: tokenizer, processor, templates."""
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(WEIGHTS) and path.name != "config.json":
            shutil.copyfile(path, folder / path.name)
