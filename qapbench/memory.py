"""Peak memory of this process, as the operating system and the GPU report it, and which devices can compute."""

from __future__ import annotations

import sys

import torch

from qapbench.errors import UserError


def check_device(kind: str) -> None:
    """Check that everything can be computed on this kind of device, such as "cuda".

    Raises:
        UserError: it is Apple's "mps".
    """
    if kind == "mps":
        raise UserError("device: mps has no float64, in which qapbench computes where last bits decide; use cpu")


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak memory in MB: resident, of the process so far; on a GPU also allocated there, since its last reset."""
    found = {"peak_memory_mb": round(peak_resident_bytes() / 2**20)}
    if device.type == "cuda":
        found["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    return found


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux and the BSDs kilobytes
