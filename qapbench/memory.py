"""Memory of this process and of the machine, as the system and the GPU report it, and which devices can compute."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qapbench.errors import UserError

PAGEOUT = 21  # MADV_PAGEOUT of Linux; kernels before 5.4 refuse it, and then nothing happens


def check_device(kind: str) -> None:
    """Check that everything can be computed on this kind of device, such as "cuda".

    Raises:
        UserError: it is Apple's "mps".
    """
    if kind == "mps":
        raise UserError("device: mps has no float64, in which qapbench computes where last bits decide; use cpu")


def peak_memory(*devices: torch.device) -> dict[str, int]:
    """Peak memory in MB: resident, of the process so far; on GPUs also allocated there, since their last reset.

    Args:
        devices: the devices that hold a model; peaks of several GPUs are added up.
    """
    found = {"peak_memory_mb": round(peak_resident_bytes() / 2**20)}
    if devices[0].type == "cuda":
        found["peak_gpu_memory_mb"] = round(_allocated(devices) / 2**20)
    return found


def _allocated(devices: Sequence[torch.device]) -> int:
    """Most bytes that were allocated on each of several GPUs since its last reset, added up."""
    return sum(torch.cuda.max_memory_allocated(device) for device in devices)


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    return max(_Highest.resident, _peak_since_reset())


class _Highest:
    """Largest resident set in bytes before the system's own mark was set back."""

    resident = 0


def _peak_since_reset() -> int:
    """Largest resident set in bytes that the system remembers."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        with contextlib.suppress(OSError, StopIteration, ValueError), Path("/proc/self/status").open() as status:
            return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux and the BSDs kilobytes


class Phases:
    """Peak memory of each phase of this process's work.

    Where the system cannot set its mark back (all but Linux), the peak of a phase is that of the process so far.

    Args:
        devices: devices whose memory is measured too, if they are GPUs.

    Attributes:
        resident: phase -> largest resident set in it, in MB.
        gpu: phase -> most memory allocated on the GPUs in it, in MB.
    """

    def __init__(self, *devices: torch.device) -> None:
        self.devices = devices
        self.resident: dict[str, int] = {}
        self.gpu: dict[str, int] = {}
        self._now: str | None = None

    def begin(self, name: str) -> None:
        """End the phase under way, and begin another one. A phase that is begun again goes on."""
        self.end()
        self._now = name
        _Highest.resident = peak_resident_bytes()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
        if self.devices[0].type == "cuda":
            for device in self.devices:
                torch.cuda.reset_peak_memory_stats(device)

    def end(self) -> None:
        """End the phase under way, if there is one."""
        if self._now is None:
            return
        found = {"resident": _peak_since_reset()}
        if self.devices[0].type == "cuda":
            found["gpu"] = _allocated(self.devices)
        for kind, peak in found.items():
            peaks = getattr(self, kind)
            peaks[self._now] = max(peaks.get(self._now, 0), round(peak / 2**20))
        self._now = None

    @property
    def peaks(self) -> dict[str, int]:
        """Peak memory in MB, as `peak_memory` has it, and that of each phase, as "memory of NAME"."""
        found = {**peak_memory(*self.devices)}
        found |= {f"memory of {name}": peak for name, peak in self.resident.items()}
        if self.gpu:
            found["peak_gpu_memory_mb"] = max(found["peak_gpu_memory_mb"], *self.gpu.values())
            found |= {f"gpu memory of {name}": peak for name, peak in self.gpu.items()}
        return found


def give_back_freed() -> None:
    """Give memory that is free inside this process back to the system, where the C library can (glibc).

    It keeps what large tensors leave behind, which among weights of several sizes adds up to a good part of a model.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


def page_out(tensor: torch.Tensor) -> None:
    """Let the system drop the pages of a tensor that is a file mapped into memory (Linux; elsewhere nothing happens).

    Nothing is lost: pages that were changed stay, the others are read from the file when they are used.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or tensor.untyped_storage().resizable():
        return  # memory of torch's own is no mapped file
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - begin
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), PAGEOUT)


@functools.lru_cache(maxsize=1)
def _trim() -> Any:
    """glibc's `malloc_trim`; None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # Windows has no such handle
        return None


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a process could still take on a device, with swap on the host; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or sys.platform != "linux":
        return None
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        known = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1}
        free = known["MemAvailable"] + known.get("SwapFree", 0)
    except (OSError, ValueError, KeyError):
        return None
    left = _left_in_container()
    return free if left is None else min(free, left)


def _left_in_container() -> int | None:
    """Bytes that a container's limit still allows, if it has one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        words = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = sum(int(count) for name, count in words if name in ("active_file", "inactive_file"))
        return int(limit) - int(used) + cached
    except (OSError, ValueError):  # no limit is spelled "max"
        return None
