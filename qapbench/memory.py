"""Peak memory, as the machine says it."""

from __future__ import annotations

import resource

import torch


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak memory in MB: resident, of the process so far; on a GPU also allocated there, since its last reset."""
    found = {"peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}
    if device.type == "cuda":
        found["peak_gpu_memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    return found
