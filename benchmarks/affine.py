"""Speed of fake quantization, compared to a copy of the tensor, eager PyTorch, torchao and compressed-tensors.

    python -m benchmarks.affine [--threads 2] [--rounds 30] [--shape 1 640 4096] [--device cpu]

In every round, all of them run once, in turn, so that other work on the machine affects all of them. Each of them makes
a new tensor, and so does the copy (`clone`). Libraries that are not installed are left out.

glibc is configured to keep freed memory. Otherwise, memory would be returned and requested again, and the page faults
would take several times as long as what is measured, in an arbitrary one of the calls. With one thread on a CPU, the
time is the thread's own CPU time, which does not include other processes; in all other cases it is wall time.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qapbench.methods.affine import COMPILE, fake_quantize

BITS, GROUP = 4, 128
KEEP = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
Contestant = Callable[[Tensor], Tensor]


def naive(x: Tensor) -> Tensor:
    """Quantize and dequantize in the most obvious way, in the dtype of `x`."""
    groups = x.unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-8) / (2**BITS - 1)
    zero = torch.round(-low / scale)
    return ((torch.clamp(torch.round(groups / scale) + zero, 0, 2**BITS - 1) - zero) * scale).flatten(-2)


def ours(x: Tensor, compiled: bool) -> Tensor:
    """Quantize and dequantize with qapbench."""
    os.environ[COMPILE] = str(int(compiled))
    return fake_quantize(x, BITS, GROUP)


def torchao(x: Tensor) -> Tensor:
    """Quantize and dequantize with torchao."""
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    block = (1,) * (x.ndim - 1) + (GROUP,)
    span = (torch.int32, 0, 2**BITS - 1)
    scale, zero = choose_qparams_affine(x, MappingType.ASYMMETRIC, block, *span)
    levels = quantize_affine(x, block, scale, zero, *span)
    return dequantize_affine(levels, block, scale, zero, *span, output_dtype=x.dtype)


def compressed_tensors(x: Tensor) -> Tensor:
    """Quantize and dequantize with compressed-tensors."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as fake
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    args = QuantizationArgs(num_bits=BITS, symmetric=False, strategy="group", group_size=GROUP, dynamic=True)
    return fake(x, *compute_dynamic_scales_and_zp(x, args, torch.nn.Module()), args)


def contestants() -> dict[str, Contestant]:
    """What is compared, by the name in the table."""
    found: dict[str, Contestant] = {
        "copy": torch.clone,
        "qapbench, eager": functools.partial(ours, compiled=False),
        "qapbench, compiled": functools.partial(ours, compiled=True),
        "naive eager": naive,
    }
    found |= {f.__name__: f for f in (torchao, compressed_tensors) if importlib.util.find_spec(f.__name__)}
    return found


def times(tried: dict[str, Contestant], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, after two rounds that do not count."""
    taken: dict[str, list[float]] = {name: [] for name in tried}
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    clock = time.thread_time if x.is_cpu and torch.get_num_threads() == 1 else time.perf_counter
    for turn in range(rounds + 2):
        for name, run in tried.items():
            wait()
            start = clock()
            run(x)
            wait()
            if turn >= 2:
                taken[name].append((clock() - start) * 1e3)
    return taken


def keep_memory(module: str) -> None:
    """Start this module anew with glibc configured to keep freed memory, unless it is."""
    if sys.platform == "linux" and not KEEP.keys() <= os.environ.keys():  # glibc reads them when a process starts
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], {**os.environ, **KEEP})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--shape", type=int, nargs="+", default=[1, 640, 4096])
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    keep_memory("benchmarks.affine")
    torch.set_num_threads(asked.threads)
    write = sys.stdout.write
    write(f"{asked.shape}, group {GROUP}, asymmetric {BITS} bit, {asked.device}, {asked.threads} thread(s), ")
    write(f"torch {torch.__version__}, {asked.rounds} rounds\n\n")
    write("| dtype | what | least, ms | median, ms | copies (least) | copies (median) | equal to eager |\n")
    write("|---|---|--:|--:|--:|--:|---|\n")
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(asked.shape, generator=torch.Generator().manual_seed(0)).to(asked.device, dtype)
        tried, expected = contestants(), ours(x, compiled=False)
        taken = times(tried, x, asked.rounds)
        least = {name: min(ms) for name, ms in taken.items()}
        median = {name: statistics.median(ms) for name, ms in taken.items()}
        for name in tried:
            same = f"{(tried[name](x) == expected).float().mean():.4%}" if name != "copy" else ""
            ratios = (least[name] / least["copy"], median[name] / median["copy"])
            row = (str(dtype)[6:], name, f"{least[name]:.2f}", f"{median[name]:.2f}", *(f"{r:.1f}" for r in ratios))
            write(f"| {' | '.join([*row, same])} |\n")


if __name__ == "__main__":
    main()
