"""Embeddings of texts on disk, so that a text tower embeds a question once for all runs that ask it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from qapbench.files import replace_written
from qapbench.hashing import code_files, digest_files, digest_json, library_versions

SCHEMA = 1
ABOUT = "qapbench"  # key of the one entry in a file's metadata
CODE = "relevance", "row_products", "unread"  # modules that the bits of an embedding follow from


class KeptTexts:
    """The embeddings of texts by one text tower, in a folder of files that each hold those of some texts.

    They are named by the texts' hashes; no text is stored. A file that is damaged counts as not there.

    Args:
        root: folder of all towers.
        tower: content hash of the tower's checkpoint.
        device: kind of device that embeds, such as "cpu".
    """

    def __init__(self, root: Path, tower: str, device: str) -> None:
        files: dict[str, Path] = {}
        for name in CODE:
            files |= code_files(Path(__file__).with_name(f"{name}.py"), f"qapbench.models.{name}")
        machine = torch.backends.cpu.get_cpu_capability() if device == "cpu" else device
        self.folder = root / digest_json([SCHEMA, library_versions(), tower, digest_files(files), machine], 32)
        self._read: dict[str, Tensor] | None = None

    def of(self, texts: list[str]) -> dict[str, Tensor]:
        """Those of some texts that are kept: text -> [1, M, P] in float32."""
        if self._read is None:
            self._read = {}
            for path in sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else ():
                self._read |= _read(path)
        named = {text: _name(text) for text in texts}
        return {text: self._read[name] for text, name in named.items() if name in self._read}

    def keep(self, made: Mapping[str, Tensor]) -> None:
        """Write the embeddings of texts, in a file that appears complete or not at all.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {_name(text): value.detach().to("cpu", torch.float32).contiguous() for text, value in made.items()}
        if tensors:
            self.folder.mkdir(parents=True, exist_ok=True)
            about = {ABOUT: json.dumps({"sha256": _checksum(tensors)})}
            path = self.folder / f"{digest_json(sorted(tensors), 32)}.safetensors"
            replace_written(path, lambda draft: save_file(tensors, draft, about))


def _name(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _read(path: Path) -> dict[str, Tensor]:
    """The content of a file; nothing if it is damaged."""
    try:
        data = path.read_bytes()
        tensors = load(data)  # all at once: many small ones take longer one by one
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        said = json.loads(header.get("__metadata__", {}).get(ABOUT, "null"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return {}
    whole = isinstance(said, dict) and said.get("sha256") == _checksum(tensors)
    return tensors if whole else {}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes and data of all tensors."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
