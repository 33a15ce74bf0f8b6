"""Campaigns that try to lose stored answers.

    python -m benchmarks.store kill --repeat 50       a sweep killed by kill -9 at random moments, then run again
    python -m benchmarks.store damage --repeat 50     random damage to a finished sweep, then run again
    python -m benchmarks.store writers --repeat 50    writers of one store that are killed while they append

`kill` and `damage` compare answers.jsonl, scored.jsonl, receipt.json and the record (apart from when, where and how
fast it was made) with those of an undisturbed sweep. `writers` asks whether every line that a writer was told to be on
disk is there. The command ends with exit code 1 if any trial lost something.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from qapbench.records.intact import FILES
from qapbench.records.record import RECORD, read_record
from qapbench.records.store import Store
from qapbench.running.execute import run
from qapbench.spec.spec_file import load_spec

from .trials import arguments, repeated

context = multiprocessing.get_context("fork")  # what is imported here is not imported again for each trial
LINES = 10_000  # that a writer would append if it were left alone


def sweep(runs: Path, limit: int) -> None:
    """Make the runs of `quickstart`, in a process of its own."""
    import torch

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # bars of libraries
    run(load_spec("quickstart", [f"task.limit={limit}"]), runs)


def finished(work: Callable[..., None], *arguments: Any, after: float | None = None) -> bool:
    """Run work in a new process. Whether it ended well.

    Args:
        after: seconds after which the process is killed; None leaves it alone.
    """
    process = context.Process(target=work, args=arguments)
    process.start()
    process.join(after)
    if process.is_alive():
        process.kill()
    process.join()
    return process.exitcode == 0


def alike(left: Path, runs: Path) -> bool:
    """Whether two folders hold the same runs."""
    folders = sorted(path.parent.name for path in left.glob(f"*/{RECORD}"))
    if folders != sorted(path.parent.name for path in runs.glob(f"*/{RECORD}")):
        return False
    files = all((left / f / name).read_bytes() == (runs / f / name).read_bytes() for f in folders for name in FILES)
    return files and all(read_record(left / f).made_alike(read_record(runs / f)) for f in folders)


def kill(left: Path, folder: Path, limit: int, draw: random.Random, seconds: float) -> bool:
    """Kill a sweep at a random moment, and run it again."""
    finished(sweep, folder, limit, after=draw.uniform(0, seconds))
    return finished(sweep, folder, limit) and alike(left, folder)


def damage(left: Path, folder: Path, limit: int, draw: random.Random, seconds: float) -> bool:
    """Damage a random file of a finished sweep in a random way, and run it again."""
    shutil.copytree(left, folder)
    path = draw.choice([path for path in folder.glob("*/*") if path.name in (*FILES, RECORD)])
    data = path.read_bytes()
    at, length = draw.randrange(len(data)), draw.choice([1, 1, 40, 512])
    noise = draw.randbytes(length) if draw.random() < 0.5 else bytes(length)
    path.write_bytes(draw.choice([data[:at], data[:at] + noise + data[at + length :], b"", b"[1]\n"]))
    return finished(sweep, folder, limit) and alike(left, folder)


class Said(BaseModel):
    """A line of the store that `writers` writes."""

    writer: int
    number: int
    text: str

    def to_json(self) -> dict[str, Any]:
        """The line as plain data."""
        return self.model_dump()


def write(folder: Path, writer: int) -> None:
    """Append lines until killed, and note in another file how many are on disk."""
    store = Store(folder, Said)
    for number in range(LINES):
        store.append([Said(writer=writer, number=number, text="x" * 3000)])
        (folder / f"done-{writer}").write_text(str(number + 1))


def writers(left: Path, folder: Path, limit: int, draw: random.Random, seconds: float) -> bool:
    """Kill three writers of one store at random moments, while it is put in order again and again."""
    folder.mkdir()
    processes = [context.Process(target=write, args=(folder, writer)) for writer in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        until = time.monotonic() + draw.uniform(0, 0.3)
        while time.monotonic() < until:
            Store(folder, Said).arrange(_place, itertools.product(range(3), range(LINES)))
        process.kill()
        process.join()
    found = Store(folder, Said).scan()
    return _promised(folder) <= set(map(_place, found.lines)) and not found.damaged


def _place(line: Said) -> tuple[int, int]:
    return line.writer, line.number


def _promised(folder: Path) -> set[tuple[int, int]]:
    """The lines that writers were told to be on disk. A note that is being written counts for nothing."""
    notes = {int(path.name[5:]): path.read_text() for path in folder.glob("done-*")}
    return {(writer, number) for writer, text in notes.items() for number in range(int(text or 0))}


def main() -> None:
    """Run the command line."""
    given = arguments(__doc__, ("kill", "damage", "writers"), repeat=50).parse_args()
    trial = {"kill": kill, "damage": damage, "writers": writers}[given.campaign]
    with tempfile.TemporaryDirectory() as temporary:
        left, seconds = Path(temporary) / "left", 0.0
        if trial is not writers:
            started = time.monotonic()
            if not finished(sweep, left, given.limit):
                sys.exit("the undisturbed sweep failed")
            seconds = time.monotonic() - started
        repeated(given, lambda folder, draw: trial(left, folder, given.limit, draw, seconds), "lost nothing")


if __name__ == "__main__":
    main()
