"""Writes safetensors checkpoints one tensor at a time, so that no more than one is ever in memory."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
SHARD = 5 * 10**9  # bytes; files of published checkpoints are no larger
STD = 0.02  # standard deviation of the weights of matrices, as models are initialised


def write(
    folder: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, seed: int = 0, shard: int = SHARD
) -> int:
    """Write random weights as `model.safetensors`, or as several shards with their index.

    Args:
        folder: folder of the checkpoint.
        shapes: name of each weight -> its shape, in the order of the files.
        dtype: dtype of all weights.
        seed: what the weights are made from, each independently of the others.
        shard: largest size of a file in bytes, unless a single weight is larger.

    Returns:
        Bytes of all weights.
    """
    files: list[dict[str, Sequence[int]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if files[-1] and used + size > shard:
            files.append({})
            used = 0
        files[-1][name] = shape
        used += size
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    if len(files) == 1:
        _write_file(folder / "model.safetensors", files[0], dtype, seed)
        return total
    where: dict[str, str] = {}
    for number, some in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(folder / file, some, dtype, seed)
        where |= dict.fromkeys(some, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _write_file(path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, seed: int) -> None:
    """Write one file in the format of safetensors: the length of a header, the header as JSON, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            for part in _random(name, shape, dtype, seed):
                handle.write(part.view(torch.uint8).numpy().data)


def _random(name: str, shape: Sequence[int], dtype: torch.dtype, seed: int) -> Iterator[Tensor]:
    """The values of a weight, flat and in parts: norms are one, biases are zero, others are normal."""
    count, part = math.prod(shape), 2**24
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    for at in range(0, count, part):
        size = min(part, count - at)
        if name.endswith("bias"):
            yield torch.zeros(size, dtype=dtype)
        elif "norm" in name or not shape:
            yield torch.ones(size, dtype=dtype)
        else:
            yield torch.empty(size, dtype=dtype).normal_(0, STD, generator=generator)
