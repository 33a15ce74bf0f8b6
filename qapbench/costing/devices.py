"""Peak numbers of devices, and the least time that work takes on them."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import torch

from qapbench.errors import UserError, nearest

from .work import Precision, Work

HERE = "here"
"""Name of the machine that asks, whose peaks are measured."""
SIDE, COPIED, TRIES = 1536, 2**26, 4  # rows of the measured product, bytes of the measured copy, repetitions


@dataclass(frozen=True)
class Bound:
    """The least time that some work takes: no kernel can be faster.

    Attributes:
        seconds: the larger one of the two times.
        limit: which of them it is: "compute" or "memory".
    """

    seconds: float
    limit: Literal["compute", "memory"]


@dataclass(frozen=True)
class Device:
    """A device with its peak numbers, without sparsity.

    Attributes:
        name: the device in words.
        bandwidth: of its memory, in GB/s (10^9 bytes).
        peaks: TFLOP/s of matrix products by what they multiply: "32", "16", "fp8", "int8" or "int4".
        memory: in GB; None if it was not asked.
        source: where the numbers come from.
        reported: what its driver's name for it, and for smaller ones of its kind, contains; "" if it has none.
    """

    name: str
    bandwidth: float
    peaks: Mapping[str, float]
    memory: float | None = None
    source: str = ""
    reported: str = ""

    def peak(self, precision: Precision) -> float:
        """TFLOP/s for products of a precision.

        Both sides are taken in the narrowest format that the device multiplies and that holds them: W4A4 runs in int8
        where there is no int4, and W4A16 in 16 bits.
        """
        bits = max(precision.weights, precision.activations)
        fitting = [name for name, size in (("int4", 4), ("int8", 8)) if bits <= size and not precision.floating]
        fitting += ["fp8"] if bits <= 8 and precision.floating else []
        return next(self.peaks[name] for name in (*fitting, "16", "32") if name in self.peaks)

    def bound(self, work: Work) -> Bound:
        """The least time for some work: its products at the peak, or its bytes at the full bandwidth."""
        compute = sum(flops / (1e12 * self.peak(kind)) for kind, flops in work.products.items())
        memory = work.bytes / (1e9 * self.bandwidth)
        return Bound(compute, "compute") if compute >= memory else Bound(memory, "memory")


def devices() -> dict[str, Device]:
    """The devices that are known, by name."""
    listed = json.loads((files(__package__) / "devices.json").read_text("utf-8"))
    return {name: Device(**numbers) for name, numbers in listed.items()}


def find_device_peaks(name: str) -> Device:
    """A device by its name; "here" is this machine's CPU, measured for a second.

    Raises:
        UserError: there is none of that name.
    """
    if name == HERE:
        return this_machine()
    known = devices()
    if name not in known:
        raise UserError(f"no device '{name}'; {nearest(name, [*known, HERE])}")
    return known[name]


def reported_device(name: str) -> Device | None:
    """The device that a driver reports under a name, such as "NVIDIA H100 80GB HBM3"; None if it is not known.

    The peaks are those of the largest of its kind, so that no smaller one (a PCIe card) is faster than its bound.
    """
    kinds = devices().values()
    return next((one for one in kinds if re.search(rf"\b{re.escape(one.reported)}\b", name)), None)


@functools.cache
def this_machine() -> Device:
    """This machine's CPU with torch's present number of threads: a float32 product, and a copy, at their best."""
    one, source = torch.rand(SIDE, SIDE), torch.zeros(COPIED, dtype=torch.uint8)
    product = min(_seconds(lambda: one @ one) for _ in range(TRIES))
    copy = min(_seconds(source.clone) for _ in range(TRIES))
    threads = torch.get_num_threads()
    said = f"measured here with {threads} thread{'' if threads == 1 else 's'}"
    return Device("this machine", 2 * COPIED / copy / 1e9, {"32": 2 * SIDE**3 / product / 1e12}, source=said)


def _seconds(do: Callable[[], object]) -> float:
    started = time.perf_counter()
    do()
    return time.perf_counter() - started
