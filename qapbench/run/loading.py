"""Models and their content: embedded names, folders, hub ids."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qapbench.errors import UserError, nearest
from qapbench.spec import RunSpec

EMBEDDED = Path(__file__).parent.parent / "models" / "embedded"
CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Source:
    """Where a checkpoint lies, and whether it is one of the project's own stand-ins."""

    folder: Path
    embedded: bool = False


@functools.cache
def find_model(name: str) -> Source:
    """An embedded name, a checkpoint folder, or a hub id (fetched or taken from the local cache).

    Raises:
        UserError: there is no such model, or the hub cannot be reached.
    """
    embedded = sorted(path.parent.name for path in EMBEDDED.glob("*/config.json"))
    if name in embedded:
        return Source(EMBEDDED / name, embedded=True)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model: {folder} is not a checkpoint folder (no config.json)")
        if not list(folder.glob("*.safetensors")):
            raise UserError(f"model: {folder} holds no .safetensors weights; other formats are not loaded")
        return Source(folder)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"model: no embedded model or folder '{name}'; {nearest(name, embedded)}")
    from huggingface_hub import snapshot_download

    try:
        return Source(Path(snapshot_download(name, allow_patterns=list(CHECKPOINT_FILES))))
    except Exception as error:
        raise UserError(f"model: cannot get '{name}' from the hub: {type(error).__name__}") from error


def load_model(spec: RunSpec, device: torch.device, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """(model in eval mode on the device, processor).

    Raises:
        UserError: the checkpoint cannot be loaded as an image-text-to-text model.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    source = find_model(spec.model)
    dtype: Any = spec.dtype
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            source.folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        )
        processor = AutoProcessor.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"model: cannot load {source.folder}: {first}") from error
    processor.tokenizer.padding_side = "left"
    return model.eval().requires_grad_(False).to(device), processor


def fingerprints(spec: RunSpec, data: str) -> dict[str, str]:
    """Content hashes of all that a run reads: the spec's names and paths may change, these say what was there."""
    found = {"model": _digest_tree(find_model(spec.model).folder), "data": data}
    if spec.text_tower:
        found["text_tower"] = _digest_tree(find_model(spec.text_tower).folder)
    for plugin in spec.plugins:
        found[f"plugin {Path(plugin).name}"] = _digest_file(Path(plugin))
    return found


@functools.cache
def _digest_tree(folder: Path) -> str:
    files = sorted({file for pattern in CHECKPOINT_FILES for file in folder.rglob(pattern)})
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(folder)}\0{_digest_file(file)}\0".encode())
    return total.hexdigest()


def _digest_file(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
