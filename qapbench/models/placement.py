"""Spreads a model over several devices, by accelerate: which part of it is where, and the hooks that move its inputs.

A decoder block or a layer of the vision tower is never split: what is behind it is on the same device, or on a later
one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qapbench.errors import Problem, UserError
from qapbench.memory import free_bytes
from qapbench.methods.packed import packed_bytes
from qapbench.spec.quantize_spec import Scope
from qapbench.spec.run_spec import RunSpec
from qapbench.visible import visible_logger

from .family import Family, family_of

LOG = visible_logger(__name__)
USABLE = 0.9  # share of a device's free memory that weights may take; the rest is for what a forward pass makes
STEPS = 12  # halvings in which the smallest share of memory is found that is enough
HELPS = "what helps: `storage: packed` under `quantize`, `dtype: bfloat16`, `--offload`, or more GPUs"


def skeleton(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> Family:
    """The model of a checkpoint without values.

    Args:
        folder: the checkpoint.
        dtype: dtype of its weights.
        trust_remote_code: let the checkpoint run its own Python code.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return family_of(model)


def shrunk(family: Family, left: Collection[Scope], spec: RunSpec) -> None:
    """Give the linears of a model without values the size that a run holds of them.

    Args:
        family: the model.
        left: parts of it whose linears stay in their files until they are packed, or for good.
        spec: the run.
    """
    for part in left:
        weights = spec.weights_of(part)
        if weights is not None and not spec.packs:
            continue  # they are quantized in memory
        for linear in family.linears([part]).values():
            size = 1 if weights is None else packed_bytes(weights, *linear.weight.shape)
            linear.weight = _held(size)


@dataclass(frozen=True)
class Placement:
    """Where a model is put when it is loaded.

    Attributes:
        devices: names of modules, or of weights -> devices.
        left: names of linears whose weights stay in their files, because no device has room for them.
    """

    devices: Mapping[str, torch.device]
    left: Collection[str] = ()


def place(family: Family, devices: Sequence[torch.device], spare: Sequence[str] = ()) -> Placement:
    """Where the parts of a model are put: as evenly as whole layers allow, as parts of the free memory.

    Args:
        family: the model; it may be without values. Linears that stay in their files lose their weights.
        devices: the devices, in the order in which a forward pass meets them.
        spare: names of linears that may stay in their files, where the devices have no room for all of them. As few
            stay there as can be, the last ones first.

    Raises:
        UserError: the model does not fit on all of them together.
    """
    linears = family.linears(["language"])
    kept = {name: linears[name].weight for name in spare}
    total = sum(weight.nbytes for weight in family.model.parameters())
    free = [(free_bytes(device) or 2 * total) for device in devices]

    def without(count: int) -> dict[str, int] | None:
        for index, name in enumerate(spare):
            linears[name].weight = kept[name] if index < len(spare) - count else _held(1)
        return _placed(family, free, 1.0)

    best, left = without(0), spare[:0]
    if best is None:
        if not (spare and without(len(spare))):
            gigabytes = f"{total / 1e9:.1f} GB of weights do not fit on {_many(devices)}"
            free_now = " + ".join(f"{size / 1e9:.1f}" for size in free)
            stay = f"even if {len(spare)} linears stay in their files" if spare else "and none may stay in its file"
            raise UserError(Problem(f"{gigabytes} with {free_now} GB free, {stay}; {HELPS}", ("model",)))
        count = bisect_left(range(len(spare)), True, lo=1, key=lambda some: without(some) is not None)
        best, left = without(count) or {}, spare[len(spare) - count :]
        size = sum(kept[name].nbytes for name in left) / 1e9
        what = "%d of %d linears of the decoder's layers (%.1f GB) stay in their files, because %s no room for them: "
        has = f"{_many(devices)} ha{'ve' if len(devices) > 1 else 's'}"
        LOG.warning(what + "every pass reads them, which takes time", count, len(spare), size, has)
    low, high = 0.0, 1.0
    for _ in range(STEPS if len(devices) > 1 else 0):
        middle = (low + high) / 2
        if (found := _placed(family, free, middle)) is None:
            low = middle
        else:
            best, high = found, middle
    return Placement({name: devices[index] for name, index in best.items()}, left)


def _placed(family: Family, free: Sequence[int], share: float) -> dict[str, int] | None:
    """The number of the device of each part of a model that takes that share of the memory; None if it does not fit.

    Args:
        family: the model.
        free: free bytes of each device.
        share: share of what weights may take of them.
    """
    from accelerate import infer_auto_device_map

    model: Any = family.model
    whole = {type(block).__name__ for part in family.parts for block in family.blocks(part)}
    limits = {index: int(size * USABLE * share) for index, size in enumerate(free)}
    found: dict[str, Any] = infer_auto_device_map(model, limits, no_split_module_classes=sorted(whole))
    return None if {"disk", "cpu"} & set(map(str, found.values())) else found


def _held(size: int) -> nn.Parameter:
    """A weight without values that takes so many bytes."""
    return nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), requires_grad=False)


def _many(devices: Sequence[torch.device]) -> str:
    return f"{len(devices)} devices" if len(devices) > 1 else str(devices[0])


def spread(model: Any, places: Mapping[str, torch.device]) -> None:
    """Put a loaded model on its devices, with accelerate's hooks, which move inputs to where a module is."""
    from accelerate import dispatch_model

    if len(set(places.values())) == 1:
        model.to(next(iter(places.values())))
        return
    skip = getattr(model, "_skip_keys_device_placement", None)
    dispatch_model(model, dict(places), main_device=next(iter(places.values())), skip_keys=skip)


def enter_at(model: Any, device: torch.device) -> None:
    """Let the inputs of a model that transformers spread go to a device first: accelerate takes any of its devices."""
    if (hook := getattr(model, "_hf_hook", None)) is not None:
        hook.execution_device = device


def is_spread(model: Any) -> bool:
    """Whether accelerate has put a model on several devices."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1
