"""How far the forward passes of a dense run are from the plain matrix products that they consist of.

    python -m benchmarks.limit [--model diagram-llava random-100m] [--limit 8] [--batch-size 8] [--rounds 3]

A dense run in full precision answers questions by generated text, and the time of tower, prefill and decoding is added
up. Then the same products alone are multiplied: every linear layer, the patch embedding, and the two products of every
attention, each with all rows of its call at once, in the faster of two layouts of the weight. Run and products take
turns, and the least of the rounds counts. Times are CPU time of one thread, which other work on the machine affects
least; only ratios matter.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from .stages import DECODE, EMBEDDED, PREFILL, RANDOM, TOWER, Bench, StageClock

GOAL = 1 / 0.7  # largest ratio of a dense run's forward passes to their products
LIMIT = {EMBEDDED: 8, RANDOM: 1}
STAGES = (TOWER, PREFILL, DECODE)
out = Console(width=120, highlight=False)


class Products(TorchFunctionMode):
    """Collects the matrix products of a run by stage, as functions that compute them alone.

    Args:
        clock: says which stage is under way.
    """

    def __init__(self, clock: StageClock) -> None:
        super().__init__()
        self.clock = clock
        self.linears: dict[str, list[tuple[Tensor, int]]] = defaultdict(list)  # stage -> (weight [out, in], rows)
        self.batched: dict[str, list[tuple[int, ...]]] = defaultdict(list)  # stage -> (batch, rows, inner, columns)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention and self.clock.now:
            batch, heads, rows, width = args[0].shape
            columns = args[1].shape[2]
            sizes = (batch * heads, rows, width, columns), (batch * heads, rows, columns, width)
            self.batched[self.clock.now] += sizes
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def collecting(self, model: nn.Module) -> Iterator[None]:
        """Collect while the context is open."""
        # A hook for all modules, because hooks of its own tell the tower that a layer's output is looked at.
        own = {id(module) for module in model.modules()}

        def product(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if id(module) in own and isinstance(module, nn.Linear):
                self._linear(module, args)
            elif id(module) in own and isinstance(module, nn.Conv2d):
                self._patches(module, args)

        handle = register_module_forward_pre_hook(product)
        with self:
            yield
        handle.remove()

    def _linear(self, module: Any, args: tuple[Tensor, ...]) -> None:
        if self.clock.now:
            self.linears[self.clock.now].append((module.weight, args[0].numel() // module.in_features))

    def _patches(self, module: Any, args: tuple[Tensor, ...]) -> None:
        weight, image = module.weight.flatten(1), args[0]
        count = image.numel() // image.shape[1] // (module.kernel_size[0] * module.kernel_size[1])
        self.linears[self.clock.now].append((weight, count))

    def seconds(self, stage: str) -> float:
        """CPU seconds of the stage's products alone, in the faster layout."""
        return min(self._multiplied(stage, transposed) for transposed in (False, True))

    def _multiplied(self, stage: str, transposed: bool) -> float:
        linears, batched = self.linears[stage], self.batched[stage]
        held = {weight.data_ptr(): weight.T.contiguous() if transposed else weight.T for weight, _ in linears}
        widest = max((rows * len(held[weight.data_ptr()]) for weight, rows in linears), default=0)
        values = torch.randn(widest)
        pairs = {size: (torch.randn(size[:3]), torch.randn(size[0], *size[2:])) for size in set(batched)}
        started = time.process_time()
        for weight, rows in linears:
            inner = weight.shape[1]
            torch.mm(values[: rows * inner].view(rows, inner).to(weight.dtype), held[weight.data_ptr()])
        for size in batched:
            torch.bmm(*pairs[size])
        return time.process_time() - started


def measure(model: str, folder: Path, limit: int, batch_size: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Measure a model: stage -> (CPU seconds in a run, CPU seconds of its products alone)."""
    bench = Bench(model, folder, limit, batch_size)
    spec = bench.spec("generate")
    family = bench.family(spec)
    clock = StageClock(family)
    products = Products(clock)
    with clock.running(), products.collecting(family.model):
        bench.run(spec)
    spent, alone = dict.fromkeys(STAGES, float("inf")), dict.fromkeys(STAGES, float("inf"))
    for _ in range(rounds):
        clock = StageClock(family)
        with clock.running():
            bench.run(spec)
        for stage in STAGES:
            spent[stage] = min(spent[stage], clock.spent[stage].cpu)
            alone[stage] = min(alone[stage], products.seconds(stage))
    return {stage: (spent[stage], alone[stage]) for stage in STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[EMBEDDED, RANDOM])
    parser.add_argument("--limit", type=int, help=f"number of questions; by default {LIMIT}")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for model in given.model:
        with tempfile.TemporaryDirectory() as temporary:
            found = measure(model, Path(temporary), given.limit or LIMIT.get(model, 8), given.batch_size, given.rounds)
        found["all"] = tuple(map(sum, zip(*found.values(), strict=True)))  # type: ignore[assignment]
        table = Table("stage", "run, CPU ms", "products alone, CPU ms", "ratio", title=model, title_justify="left")
        for stage, (spent, alone) in found.items():
            table.add_row(stage, f"{spent * 1e3:.0f}", f"{alone * 1e3:.0f}", f"{spent / alone:.2f}")
        out.print(table)
    out.print(f"goal: all at most {GOAL:.2f}")


if __name__ == "__main__":
    main()
