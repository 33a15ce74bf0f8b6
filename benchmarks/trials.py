"""Repeats a trial with random faults, and says how often the outcome was right."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

Trial = Callable[[Path, random.Random], bool]
"""Makes runs in a folder that is not there yet, while faults are drawn, and says whether the outcome is right."""


def arguments(doc: str | None, campaigns: tuple[str, ...], repeat: int) -> argparse.ArgumentParser:
    """The command line that all campaigns have.

    Args:
        doc: what the command does.
        campaigns: their names.
        repeat: number of trials if none is given.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=campaigns)
    parser.add_argument("--repeat", type=int, default=repeat, help="number of trials")
    parser.add_argument("--limit", type=int, default=24, help="questions per run")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def repeated(given: argparse.Namespace, trial: Trial, right: str) -> None:
    """Repeat a trial, print how many were right, and exit with 1 if some were not.

    Trial n of a seed draws the same faults in every call.

    Args:
        given: the command line.
        trial: the trial.
        right: what a right outcome is, in words that follow "9 of 10 trials".
    """
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(given.repeat):
            folder, started = Path(temporary) / "trial", time.perf_counter()
            if not trial(folder, random.Random(f"{given.seed} {number}")):
                wrong.append(number)
            shutil.rmtree(folder, ignore_errors=True)
            spent = time.perf_counter() - started
            print(f"{number + 1} trials, {len(wrong)} wrong ({spent:.0f} s)", file=sys.stderr, flush=True)
    out = Console(width=120, highlight=False)
    out.print(f"{given.campaign}: {given.repeat - len(wrong)} of {given.repeat} trials {right}; seed {given.seed}")
    if wrong:
        sys.exit(f"trials that were wrong: {', '.join(map(str, wrong))}")
