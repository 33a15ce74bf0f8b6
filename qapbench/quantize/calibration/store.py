"""Calibration results on disk: one safetensors file each, named by a hash of everything the result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qapbench.files import replace_written
from qapbench.hashing import digest_json, library_versions

from .samples import CalibrationResult

SCHEMA = 1
ABOUT = "qapbench"  # key of the one entry in a file's metadata
BETWEEN = "::"
"""Separates the name of a linear from the name of its tensor."""


def key(about: Mapping[str, Any]) -> str:
    """Hash of everything that a result depends on. Versions of libraries that change numbers are added to `about`."""
    return digest_json([SCHEMA, library_versions(), dict(about)], 32)


def path_of(folder: Path, key: str) -> Path:
    """File of the result with this key."""
    return folder / f"{key}.safetensors"


def write(folder: Path, key: str, found: CalibrationResult) -> None:
    """Write a result atomically: the file appears complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for linear, named in found.items():
        for name, tensor in named.items():
            value = tensor.detach().to("cpu").contiguous()
            memory = value.untyped_storage()
            # Linears may share one tensor, but safetensors refuses shared memory, and parts of a larger one.
            whole = memory.nbytes() == value.nbytes and memory.data_ptr() not in seen
            seen.add(memory.data_ptr())
            tensors[f"{linear}{BETWEEN}{name}"] = value if whole else value.clone()
    # One metadata entry only: safetensors writes several in no fixed order.
    about = {ABOUT: json.dumps({"key": key, "linears": list(found), "sha256": _checksum(tensors)})}
    # Written tensor by tensor: the whole file as bytes would be one more copy in memory.
    replace_written(path_of(folder, key), lambda draft: save_file(tensors, draft, about))


def read(folder: Path, key: str) -> tuple[CalibrationResult | None, str]:
    """Read the result with this key.

    Returns:
        (the result, ""), or (None, the reason why a file that exists is unusable), or (None, "") if there is no file.
    """
    path = path_of(folder, key)
    if not path.exists():
        return None, ""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (the file is not a dict)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        return None, f"{path.name} cannot be read: {error}"
    if not isinstance(about, dict):
        return None, f"{path.name} does not say what it holds"
    if about.get("key") != key:
        return None, f"{path.name} holds the result of something else"
    if about.get("sha256") != _checksum(tensors):
        return None, f"{path.name} is damaged: its content does not match its checksum"
    found: CalibrationResult = {linear: {} for linear in about["linears"]}
    for name, tensor in tensors.items():
        linear, _, inner = name.partition(BETWEEN)
        found[linear][inner] = tensor
    return found, ""


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and data of all tensors."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
