"""Peak memory of this process, as the operating system and the GPU report it."""

from __future__ import annotations

import sys

import torch


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
