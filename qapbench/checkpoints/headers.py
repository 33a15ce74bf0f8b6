"""What the files of a checkpoint hold, read from their headers alone: no weight is read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

LONGEST = 100 * 2**20  # bytes of a header; safetensors refuses longer ones


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        name: its name.
        dtype: its dtype as the file spells it, such as "BF16".
        shape: its shape.
        size: its bytes in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def loaded(self, width: int) -> int:
        """Its bytes in a model whose weights have `width` bytes each. Only floating-point values change their width."""
        return self.count * width if self.dtype.startswith(("F", "BF")) else self.size


def stored(folder: Path) -> list[Stored]:
    """The tensors of all safetensors files in a folder. A file that cannot be read holds none."""
    return [tensor for path in sorted(folder.glob("*.safetensors")) for tensor in _of_file(path)]


def _of_file(path: Path) -> list[Stored]:
    try:
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length)) if length <= LONGEST else {}
        return [
            Stored(
                name, str(one["dtype"]), tuple(map(int, one["shape"])), one["data_offsets"][1] - one["data_offsets"][0]
            )
            for name, one in header.items()
            if name != "__metadata__"
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return []  # loading says what is wrong with it
