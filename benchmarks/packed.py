"""Packed weights against unpacked ones: time and memory of single linears in the shapes of a 7B model.

    python -m benchmarks.packed [--tokens 640] [--dtype float32]

Each linear is timed alone, with the weight unpacked and packed by turns, so that what else runs on the machine slows
both. Goals: a prefill takes at most 1.5 times as long, and no bit of the output differs.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

from qapbench import Format, LinearPlan
from qapbench.quantize.packed import Buffer, held_packed, packed_weight

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # (outputs, inputs)
FORMATS = {
    "2-bit asym g128": Format(bits=2, group_size=128),
    "3-bit asym g128": Format(bits=3, group_size=128),
    "4-bit asym g128": Format(bits=4, group_size=128),
    "8-bit sym row": Format(bits=8, symmetric=True),
    "nvfp4": Format(format="nvfp4", bits=4),
}
GOAL = 1.5


def seconds(linear: nn.Linear, x: torch.Tensor) -> float:
    """Time of one product."""
    start = time.perf_counter()
    linear(x)
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    """Print a line for each shape and format."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=640)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    asked = parser.parse_args()
    dtype, buffer = getattr(torch, asked.dtype), Buffer()
    print(f"{asked.tokens} tokens, {asked.dtype}, {torch.get_num_threads()} thread(s); least of {asked.repeat} times")
    for shape in SHAPES:
        with torch.inference_mode(False), torch.no_grad():
            plain = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype).requires_grad_(False)
            held = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype, device="meta").requires_grad_(False)
            held.weight = nn.Parameter(torch.zeros(1, 1, dtype=dtype).expand(shape), requires_grad=False)
            original = plain.weight.clone()
        x = torch.randn(1, asked.tokens, shape[1]).to(dtype)
        for name in asked.formats:
            format = FORMATS[name]
            packed = packed_weight(LinearPlan(format), original, "the linear", "rtn")
            plain.weight.copy_(format(original))
            with held_packed(held, packed, buffer):
                same = torch.equal(plain(x), held(x))
                times = [(seconds(plain, x), seconds(held, x)) for _ in range(asked.repeat)]
            one, two = (min(pair[side] for pair in times) for side in (0, 1))
            verdict = "ok" if two <= GOAL * one and same else "MISSED"
            bits = 8 * packed.nbytes / original.numel()
            print(
                f"{shape[0]:>5} x {shape[1]:<5} {name:<15} {bits:5.2f} bits per weight, "
                f"{packed.nbytes / 1e6:6.1f} of {original.nbytes / 1e6:6.1f} MB; unpacked {1e3 * one:7.1f} ms, "
                f"packed {1e3 * two:7.1f} ms, {two / one:.2f} times; {'same bits' if same else 'OTHER BITS'}: {verdict}"
            )


if __name__ == "__main__":
    main()
