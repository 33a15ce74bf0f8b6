"""Results of calibrations on disk: one safetensors file each, named by the content that it depends on."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from qapbench.checkpoints import digest_file

from .samples import Found

SCHEMA = 1
ABOUT = "qapbench"
BETWEEN = "::"
"""Between the name of a linear and that of its tensor."""


def key(about: Mapping[str, Any]) -> str:
    """Hash of all that a result depends on, this package's arithmetic among it."""
    text = json.dumps([SCHEMA, _arithmetic(), torch.__version__, about], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _arithmetic() -> str:
    package = Path(__file__).parents[1]
    files = [*sorted(Path(__file__).parent.glob("*.py")), *(package / f"{n}.py" for n in ("affine", "quantization"))]
    return hashlib.sha256("".join(map(digest_file, files)).encode()).hexdigest()


def path_of(folder: Path, key: str) -> Path:
    return folder / f"{key}.safetensors"


def write(folder: Path, key: str, found: Found) -> None:
    """Keep a result, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        # Linears may share one tensor; the format has each of its own.
        f"{linear}{BETWEEN}{name}": tensor.detach().to("cpu", copy=True).contiguous()
        for linear, named in found.items()
        for name, tensor in named.items()
    }
    # One entry: safetensors writes several in no fixed order.
    about = {ABOUT: json.dumps({"key": key, "linears": list(found), "sha256": _checksum(tensors)})}
    path = path_of(folder, key)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    with draft.open("wb") as handle:
        handle.write(save(tensors, about))
        handle.flush()
        os.fsync(handle.fileno())
    draft.replace(path)


def read(folder: Path, key: str) -> tuple[Found | None, str]:
    """(the result of that key, "") or (None, why it cannot be had; "" where there simply is none)."""
    path = path_of(folder, key)
    if not path.exists():
        return None, ""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    except (SafetensorError, OSError, ValueError) as error:
        return None, f"{path.name} cannot be read: {error}"
    if about.get("key") != key:
        return None, f"{path.name} holds the result of something else"
    if about.get("sha256") != _checksum(tensors):
        return None, f"{path.name} is damaged: its content does not match its checksum"
    found: Found = {linear: {} for linear in about["linears"]}
    for name, tensor in tensors.items():
        linear, _, inner = name.partition(BETWEEN)
        found[linear][inner] = tensor
    return found, ""


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
