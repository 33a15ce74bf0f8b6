"""Fake quantization on a CPU in two compiled loops: one finds the range of each group, the other rounds to its levels.

What lies between, scale and zero point, is the arithmetic of `affine`, so there is one place for it. The loops are C,
compiled for the processor at hand when they are first used, in a fraction of a second. They convert, divide, round and
multiply as PyTorch does: correctly rounded, without fused operations. The bits are those of the eager computation.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

COMPILER = "CC"  # environment variable that names another C compiler
FLAGS = (
    *("-O3", "-march=native", "-std=c11", "-shared", "-fPIC"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
VECTORS = 64  # values by which a vectorised loop advances at most; PyTorch may clamp a zero of the rest to another sign
SHARE = 2**17  # values from which another thread is worth its start
SOURCE = r"""
#include <math.h>
#include <stdint.h>

typedef union { float value; int32_t bits; } Float32;

static inline float read_float32(float x) { return x; }
static inline float write_float32(float x) { return x; }

static inline float read_bfloat16(uint16_t x) {
  Float32 found = {.bits = (int32_t)((uint32_t)x << 16)};
  return found.value;
}

static inline uint16_t write_bfloat16(float x) {  /* ties to even; no NaN */
  Float32 given = {.value = x};
  uint32_t bits = (uint32_t)given.bits;
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

/* Numbers as integers of their own order; NaNs lie beyond the infinities. Applied twice it changes nothing. */
static inline int32_t ordered_float32(int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); }
static inline int16_t ordered_bfloat16(int16_t bits) { return bits ^ ((bits >> 15) & 0x7FFF); }
static inline int32_t widened_float32(int32_t bits) { return bits; }
static inline int32_t widened_bfloat16(int16_t bits) { return (int32_t)((uint32_t)(uint16_t)bits << 16); }

static inline float end(int32_t bits, int broken) {
  Float32 found = {.bits = bits};
  return broken ? NAN : found.value;
}

#define LOOPS(NAME, TYPE, BITS, INFINITE)                                                             \
  void ends_##NAME(const BITS *restrict x, int64_t groups, int64_t width, float *restrict low,        \
                   float *restrict high) {                                                            \
    for (int64_t g = 0; g < groups; g++, x += width) {                                                \
      BITS least = ordered_##NAME(x[0]), most = least;                                                \
      for (int64_t at = 0; at < width; at++) {                                                        \
        BITS place = ordered_##NAME(x[at]);                                                           \
        least = place < least ? place : least;                                                        \
        most = place > most ? place : most;                                                           \
      }                                                                                               \
      int broken = most > INFINITE || least < -INFINITE - 1;                                          \
      low[g] = end(widened_##NAME(ordered_##NAME(least)), broken);                                    \
      high[g] = end(widened_##NAME(ordered_##NAME(most)), broken);                                    \
    }                                                                                                 \
  }                                                                                                   \
  void levels_##NAME(const TYPE *restrict x, int64_t groups, int64_t width, const float *restrict scale, \
                     TYPE *restrict out, const float *restrict lowest, const float *restrict highest) { \
    for (int64_t g = 0; g < groups; g++, x += width, out += width) {                                  \
      float step = scale[g];                                                                          \
      if (!(step - step == 0)) {                                                                      \
        for (int64_t at = 0; at < width; at++) out[at] = nan_##NAME;                                  \
      } else if (lowest) {                                                                            \
        float floor = lowest[g], ceiling = highest[g];                                                \
        for (int64_t at = 0; at < width; at++) {                                                      \
          float level = rintf(read_##NAME(x[at]) / step);                                             \
          level = level < ceiling ? level : ceiling;                                                  \
          level = level > floor ? level : floor;                                                      \
          out[at] = write_##NAME(level * step);                                                       \
        }                                                                                             \
      } else {                                                                                        \
        for (int64_t at = 0; at < width; at++)                                                        \
          out[at] = write_##NAME(rintf(read_##NAME(x[at]) / step) * step);                            \
      }                                                                                               \
    }                                                                                                 \
  }

static const float nan_float32 = NAN;
static const uint16_t nan_bfloat16 = 0x7FC0;

LOOPS(float32, float, int32_t, 0x7F800000)
LOOPS(bfloat16, uint16_t, int16_t, 0x7F80)
"""


class Kernel:
    """The compiled loops.

    Args:
        library: the library that they are in.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._ends, self._levels = {}, {}
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            self._ends[dtype], self._levels[dtype] = library[f"ends_{name}"], library[f"levels_{name}"]
            self._ends[dtype].argtypes = [pointer, number, number, pointer, pointer]
            self._levels[dtype].argtypes = [pointer, number, number, *[pointer] * 4]

    def takes(self, x: Tensor, out: Tensor) -> bool:
        """Whether the loops can read groups x [R, G, D] and write them to `out`."""
        whole = x.is_contiguous() and out.is_contiguous()
        return x.is_cpu and x.dtype in self._ends and whole and x.numel() > 0 and x.shape[-1] % VECTORS == 0

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Minimum and maximum of each group of x [R, G, D], each [R, G, 1] in float32; NaN of one with a NaN."""
        low, high = (torch.empty(*x.shape[:-1], 1, dtype=torch.float32) for _ in range(2))
        width, size = x.shape[-1], x.element_size()

        def part(start: int, count: int) -> None:
            at = x.data_ptr() + start * width * size
            self._ends[x.dtype](at, count, width, low.data_ptr() + start * 4, high.data_ptr() + start * 4)

        _shared(part, low.numel(), width)
        return low, high

    def round(self, x: Tensor, scale: Tensor, out: Tensor, ends: tuple[Tensor, Tensor] | None) -> None:
        """Write round(x / scale) * scale to `out`.

        Args:
            x: [R, G, D].
            scale: [R, G, 1] in float32.
            out: like x.
            ends: lowest and highest level, each [R, G, 1] in float32, that values are clamped to; None clamps none.
        """
        width, size = x.shape[-1], x.element_size()
        # Held until the loops are through.
        of_group = [one.contiguous() for one in (scale, *(ends or ()))]

        def part(start: int, count: int) -> None:
            offset = start * width * size
            step, *clamp = [one.data_ptr() + start * 4 for one in of_group]
            self._levels[x.dtype](
                x.data_ptr() + offset, count, width, step, out.data_ptr() + offset, *(clamp or (None, None))
            )

        _shared(part, scale.numel(), width)


def _shared(part: Callable[[int, int], None], groups: int, width: int) -> None:
    """Call `part(first, number)` for all groups, in as many threads as torch has and the work is worth.

    ctypes gives up the interpreter's lock meanwhile. No group is cut, so no bit depends on the number of threads.
    """
    threads = min(torch.get_num_threads(), groups * width // SHARE)
    if threads <= 1:
        part(0, groups)
        return
    step = -(-groups // threads)
    starts = range(0, groups, step)
    list(_pool(os.getpid()).map(lambda start: part(start, min(step, groups - start)), starts))


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of a process; a forked one has none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count() or 1)


@functools.cache
def kernel() -> Kernel | None:
    """Compile the loops, once per process. Returns None, after one warning, if there is no compiler that can."""
    compiler = os.environ.get(COMPILER) or shutil.which("cc") or "gcc"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        library = Path(folder) / "affine.so"
        try:
            command = [*compiler.split(), *FLAGS, "-x", "c", "-", "-o", str(library), "-lm"]
            subprocess.run(command, input=SOURCE, check=True, capture_output=True, text=True, timeout=120)
            return Kernel(ctypes.CDLL(str(library)))
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            warnings.warn(
                f"no C compiler works here ({said[0] if said else error}): fake quantization runs eager", stacklevel=3
            )
            return None
