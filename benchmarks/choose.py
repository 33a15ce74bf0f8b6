"""What choosing tokens costs in a real run, compared with the tower's forward pass of the same images.

    python -m benchmarks.choose [--model diagram-llava random-100m] [--profile]

Questions are answered by W4A4 cdpruner with the combined sensitivity, in one process. The choice is everything between
the tower and the decoder: the text tower, relevance, sensitivity, selection and the assembly of the shorter prompt.
Times are CPU time of this process; the tower counts with the projector. An earlier run has left the embedded questions
in its folder, as every run after the first finds them; `--first` measures the first one.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import pstats
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from qapbench.prune.pruning import Pruning
from qapbench.running.prompt_encoder import PromptEncoder
from qapbench.running.sweep import TEXTS

from .stages import EMBEDDED, RANDOM, TOWER, Bench, Spent, StageClock

GOAL = 0.10  # largest ratio of the choice to the tower
KEEP = {EMBEDDED: (32, 144), RANDOM: (128, 576)}
LIMIT = {EMBEDDED: 48, RANDOM: 6}
W4A4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 128}, "activations": {"bits": 4, "group_size": 128}}
out = Console(width=120, highlight=False)


@contextlib.contextmanager
def timed_choice(profile: cProfile.Profile | None = None) -> Iterator[Spent]:
    """Add up what the choice takes while the context is open."""
    spent = Spent()

    def timed(inner: Any, counts: bool) -> Any:
        def call(self: Any, given: Any) -> Any:
            given = list(given)
            wall, cpu = time.perf_counter(), time.process_time()
            if profile:
                profile.enable()
            found = inner(self, given)
            if profile:
                profile.disable()
            spent.cpu += time.process_time() - cpu
            spent.wall += time.perf_counter() - wall
            spent.calls += counts * len(given)
            return found

        return call

    with (
        mock.patch.object(Pruning, "prune_each", timed(Pruning.prune_each, True)),
        mock.patch.object(PromptEncoder, "expect", timed(PromptEncoder.expect, False)),
    ):
        yield spent


def measure(
    model: str,
    folder: Path,
    rounds: int,
    profile: cProfile.Profile | None = None,
    limit: int | None = None,
    kept: bool = True,
) -> tuple[Spent, Spent]:
    """What choice and tower take in the quicker of several runs, after one that does not count.

    Args:
        model: a key of `KEEP`.
        folder: folder for checkpoint and records.
        rounds: number of runs that count.
        profile: profiles the choice.
        limit: number of questions.
        kept: whether an earlier run left the embedded questions on disk.
    """
    bench = Bench(model, folder, limit or LIMIT[model], 8)
    prune = {"method": "cdpruner", "keep": KEEP[model][0], "sensitivity": "combined"}
    spec = bench.spec(quantize=W4A4, prune=prune)
    family = bench.family(spec)
    best: list[tuple[Spent, Spent]] = []
    for turn in range(rounds + 1):
        clock, pruning = StageClock(family), bench.session.pruning(spec)
        if pruning is not None and pruning.reader.tower is not None:
            pruning.reader.tower.known.clear()  # as in a process of its own
        if turn and kept:
            shutil.copytree(folder / f"runs-{turn}" / TEXTS, folder / f"runs-{turn + 1}" / TEXTS)
        with timed_choice(profile if turn else None) as choice, clock.running():
            bench.run(spec)
        best += [(choice, clock.spent[TOWER])] * bool(turn)
    return min(best, key=lambda pair: pair[0].cpu / pair[1].cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(KEEP), default=list(KEEP))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--first", action="store_true", help="no earlier run embedded the questions")
    parser.add_argument("--profile", action="store_true", help="show the functions in which the choice spends its time")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    table = Table("model", "tokens", "choice, CPU ms", "tower, CPU ms", "choice / tower", "wall")
    for model in given.model:
        profile = cProfile.Profile() if given.profile else None
        with tempfile.TemporaryDirectory() as temporary:
            choice, tower = measure(model, Path(temporary), given.rounds, profile, given.limit, not given.first)
        keep, count = KEEP[model]
        each = f"{choice.cpu / choice.calls * 1e3:.2f}", f"{tower.cpu / tower.calls * 2e3:.2f}"
        wall = f"{choice.wall / tower.wall:.2f}"
        table.add_row(model, f"{keep} of {count}", *each, f"{choice.cpu / tower.cpu:.2f}", wall)
        if profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(35)
    out.print(table)
    out.print(f"per question and per image; goal: at most {GOAL:.2f}")


if __name__ == "__main__":
    main()
