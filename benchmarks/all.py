"""The goals of speed that are measured, one line each: the goal, and what it is here.

    python -m benchmarks.all [--quick]

Each is measured by a module of its own, which says how; `--quick` asks fewer questions, of the embedded model only.
Only ratios are reported, and every ratio is of times from one process.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import affine, against_lmms_eval, choose, decoding, limit
from .stages import EMBEDDED, RANDOM

COPIES = {torch.float32: 2.5, torch.bfloat16: 4.0}  # most that fake quantization may take, in copies of the tensor
Line = tuple[str, str, str, bool]
"""What is measured, the goal, what it is here, and whether the goal is reached."""


def compute(models: list[str], rounds: int) -> Iterator[Line]:
    """The forward passes of a dense run, in plain matrix products of the same shapes."""
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            found = limit.measure(model, Path(folder), limit.LIMIT[model], 8, rounds)
        ratio = sum(spent for spent, _ in found.values()) / sum(alone for _, alone in found.values())
        stages = ", ".join(f"{stage} {spent / alone:.2f}" for stage, (spent, alone) in found.items())
        yield (
            f"dense run / its products, {model}",
            f"<= {limit.GOAL:.2f}",
            f"{ratio:.2f} ({stages})",
            ratio <= limit.GOAL,
        )


def choice(models: list[str], rounds: int) -> Iterator[Line]:
    """The choice of tokens, in forward passes of the tower."""
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            spent, tower = choose.measure(model, Path(folder), rounds)
        ratio, (keep, count) = spent.cpu / tower.cpu, choose.KEEP[model]
        name = f"choosing {keep} of {count} / tower, {model}"
        yield name, f"<= {choose.GOAL:.2f}", f"{ratio:.2f}", ratio <= choose.GOAL


def decode(models: list[str], rounds: int) -> Iterator[Line]:
    """Tokens per second of a batch of 16, in those of one row."""
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            ratio, equal = decoding.measure(model, Path(folder), rounds)
        said = f"{ratio:.2f}{'' if equal else ', and the texts differ'}"
        yield (
            f"decoding, batch {decoding.ROWS} / batch 1, {model}",
            f">= {decoding.GOAL:.1f}",
            said,
            ratio >= decoding.GOAL,
        )


def fake_quantization(rounds: int) -> Iterator[Line]:
    """Fake quantization, in copies of the tensor: by eager PyTorch, and by the compiled loops."""
    tried = {
        "copy": torch.clone,
        "eager": lambda x: affine.ours(x, compiled=False),
        "compiled": lambda x: affine.ours(x, compiled=True),
    }
    for dtype, goal in COPIES.items():
        x = torch.randn(1, 640, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
        taken = affine.times(tried, x, rounds)
        for way in ("eager", "compiled"):
            copies = min(taken[way]) / min(taken["copy"])
            name = f"fake quantization, {way} / copy, {str(dtype)[6:]}"
            yield name, f"<= {goal:.1f}", f"{copies:.2f}", copies <= goal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the embedded model only, one round")
    given = parser.parse_args()
    affine.keep_memory("benchmarks.all")
    torch.set_num_threads(1)
    models, rounds = ([EMBEDDED], 1) if given.quick else ([EMBEDDED, RANDOM], 3)
    table = Table("what", "goal", "here", "reached")
    for lines in (
        fake_quantization(4 * rounds),
        compute(models, rounds),
        choice(models, rounds),
        decode(models, rounds),
    ):
        for what, goal, here, reached in lines:
            table.add_row(what, goal, here, "yes" if reached else "no")
    out = Console(width=140, highlight=False)
    out.print(table)
    goals = ", ".join(f"{name} {goal:g}x" for name, goal in against_lmms_eval.GOALS.items())
    out.print(f"The goals against lmms-eval ({goals}) take minutes: python -m benchmarks.against_lmms_eval")


if __name__ == "__main__":
    main()
