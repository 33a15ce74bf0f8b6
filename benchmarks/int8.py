"""Speed of one linear layer in W8A8 with torchao's int8 kernels, compared to bfloat16 and float32.

    python -m benchmarks.int8 [--width 4096] [--tokens 640] [--repeat 20] [--device cpu] [--eager]

Times are medians over rounds in which all of them run in turn, so that other work on the machine affects all of them.
Only the ratios of times are meaningful.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from qapbench import Format, LinearPlan
from qapbench.quantize.backends import int8_linear
from qapbench.quantize.receipts import LinearReceipt

INT8 = Format(bits=8, symmetric=True)
WAYS = ("float32", "bfloat16", "simulated W8A8, float32", "torchao W8A8, eager", "torchao W8A8, compiled")


def linear_of(width: int, dtype: torch.dtype, device: str) -> nn.Linear:
    """Make a linear layer of width x width random weights, which are the same in every call."""
    torch.manual_seed(0)
    return nn.Linear(width, width, bias=False).requires_grad_(False).to(device, dtype)


def measure(width: int, tokens: int, repeat: int, device: str, compiling: bool) -> dict[str, float]:
    """Measure the median milliseconds of each of WAYS.

    Args:
        width: width of the input and of the output.
        tokens: number of tokens in the input.
        repeat: number of rounds; two more before them do not count.
        device: device to run on.
        compiling: whether to measure the compiled layer, too.
    """
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).to(device)
    half = x.bfloat16()
    with contextlib.ExitStack() as stack:
        plain, brief = linear_of(width, torch.float32, device), linear_of(width, torch.bfloat16, device)
        quantized = linear_of(width, torch.bfloat16, device)
        plan = LinearPlan(INT8, INT8)
        stack.enter_context(
            int8_linear(quantized, plan, LinearReceipt(name="linear", part="language", shape=(width, width)))
        )
        compiled = torch.compile(lambda y: nn.functional.linear(y, quantized.weight))
        simulated = INT8(plain.weight)
        calls: dict[str, Callable[[], Tensor]] = dict(
            zip(
                WAYS,
                (
                    lambda: plain(x),
                    lambda: brief(half),
                    lambda: nn.functional.linear(INT8(x), simulated),
                    lambda: quantized(half),
                    lambda: compiled(half),
                ),
                strict=True,
            )
        )
        if not compiling:
            del calls[WAYS[-1]]
        times: dict[str, list[float]] = {name: [] for name in calls}
        with torch.inference_mode():
            for turn in range(repeat + 2):
                for name, call in calls.items():
                    started = time.perf_counter()
                    call()
                    if device != "cpu":
                        torch.cuda.synchronize()
                    if turn >= 2:
                        times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, nargs="+", default=[640, 1])
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--eager", action="store_true", help="leave out the compiled layer, since compiling takes minutes"
    )
    args = parser.parse_args()
    for tokens in args.tokens:
        found = measure(args.width, tokens, args.repeat, args.device, not args.eager)
        base = found["bfloat16"]
        sys.stdout.write(f"[{tokens}, {args.width}] x [{args.width}, {args.width}] on {args.device}, ")
        sys.stdout.write(f"{torch.get_num_threads()} thread(s)\n")
        for name, value in found.items():
            sys.stdout.write(f"  {name:26} {value:9.2f} ms  {value / base:5.2f} x bfloat16\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
