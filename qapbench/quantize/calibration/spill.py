"""Tensors of a calibration that move to temporary files, mapped into memory, when there are too many of them."""

from __future__ import annotations

import os
import sys
import tempfile
import weakref

import torch
from torch import Tensor

LIMIT = 2**30  # bytes that are kept in memory
WHOLE = 2**16  # bytes of a tensor up to which a file of its own costs more than it saves


class Spill:
    """Keeps tensors in host memory up to a limit, and those beyond it in files.

    A tensor in a file is an ordinary tensor, with the same bits, at an aligned address. The system reads its pages when
    they are used and may drop them at any time. Its file has no name any more and is gone with the tensor.

    Args:
        limit: bytes that are kept in memory.

    Attributes:
        held: bytes of the tensors in memory that are still in use.
        spilled: bytes that were written to files so far.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self.held = 0
        self.spilled = 0

    def keep(self, tensor: Tensor, later: bool = False) -> Tensor:
        """The tensor in host memory, or in a file if the limit is reached.

        Args:
            tensor: the tensor.
            later: whether it is read again much later, so that `page_out` is to take it out of memory in between. What
                goes to a file is then on the disk at once.
        """
        kept = tensor.detach().to("cpu")
        beyond = self.held + kept.nbytes > self.limit and kept.nbytes > WHOLE and kept.is_contiguous()
        if beyond and (mapped := _in_file(kept, later)) is not None:
            self.spilled += kept.nbytes
            return mapped
        self.held += kept.nbytes
        weakref.finalize(kept, self._release, kept.nbytes)
        return kept

    def _release(self, size: int) -> None:
        self.held -= size


def _in_file(tensor: Tensor, later: bool) -> Tensor | None:
    """A copy of the tensor in a file that is mapped into memory; None where that cannot be.

    Args:
        tensor: the tensor.
        later: whether its pages are written to the disk at once.
    """
    if sys.platform == "win32":  # a file that is mapped cannot be deleted there
        return None
    try:
        with tempfile.NamedTemporaryFile(prefix="qapbench-") as file:
            # Take the room on disk first: writing to the mapped pages of a full disk would end the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
            else:
                file.write(bytes(tensor.nbytes))
                file.flush()
            mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
            mapped.copy_(tensor.flatten())
            if later:
                os.fsync(file.fileno())  # only pages that are on the disk can leave memory
    except OSError:  # the disk is full
        return None
    return mapped.view(tensor.shape)
