"""Campaigns that kill workers, nodes and the driver of a Ray cluster on this machine.

    python -m benchmarks.ray_faults kill --repeat 10        a worker and a node, at random moments
    python -m benchmarks.ray_faults driver --repeat 10      the command itself, which is then called again
    python -m benchmarks.ray_faults overhead --repeat 3     the time of `--engine ray` against `--workers 2`

The first two compare the stored answers, scores and receipts with those of an undisturbed local sweep, and end with
exit code 1 if any trial differs. The cluster has two nodes, each with one core. `overhead` asks as many questions as
`quickstart` itself, unless `--limit` says otherwise: what starting Ray takes does not grow with them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from qapbench.records.intact import FILES
from qapbench.records.record import RECORD
from qapbench.running import ray_cluster
from qapbench.running.execute import run
from qapbench.spec.spec_file import load_spec

from .trials import arguments, repeated

context = multiprocessing.get_context("spawn")  # a forked process would share its connection to Ray
NODE: dict[str, Any] = {
    "num_cpus": 1,
    "object_store_memory": 80 << 20,
    "include_dashboard": False,
    "include_log_monitor": False,
    "no_monitor": True,
}
ACTOR = "RayWorker"  # how the processes of workers are called
out = Console(width=120, highlight=False)


def sweep(runs: Path, limit: int | None, more: dict[str, Any]) -> None:
    """Make the runs of `quickstart`."""
    import torch

    torch.set_num_threads(1)
    run(load_spec("quickstart", [f"task.limit={limit}"] if limit else []), runs, **more)


@contextlib.contextmanager
def cluster() -> Iterator[Any]:
    """While the context is open, a Ray cluster of two nodes is on this machine. This process is on the first."""
    os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")  # of a machine that does other things too
    ray_cluster.import_ray()
    from ray.cluster_utils import Cluster

    found = started(lambda: Cluster(initialize_head=True, head_node_args=NODE))
    try:
        started(lambda: found.add_node(**NODE))
        yield found
    finally:
        ray_cluster.disconnect()
        found.shutdown()


def started(start: Callable[[], Any]) -> Any:
    """Start a node. Ray waits for it for 30 s, which may not be enough on a machine that does other things too."""
    for _ in range(9):
        try:
            return start()
        except Exception as error:  # it has no class of its own
            out.print(f"a node is started again: {error}")
    return start()


def stored(runs: Path) -> dict[str, bytes]:
    """The files of all finished runs, by run id and name."""
    folders = sorted(path.parent for path in runs.glob(f"*/{RECORD}"))
    return {f"{folder.name}/{name}": (folder / name).read_bytes() for folder in folders for name in FILES}


def answered(runs: Path) -> int:
    """Number of answers on disk."""
    return sum(path.read_bytes().count(b"\n") for path in runs.glob("*/answers.jsonl"))


def acting(runs: Path, number: int, act: Callable[[], None]) -> threading.Thread:
    """Act in another thread when that many answers are on disk."""

    def wait() -> None:
        until = time.monotonic() + 600
        while answered(runs) < number and time.monotonic() < until:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def kill_worker(draw: random.Random) -> None:
    """Kill one of the workers on this machine by `kill -9`, as soon as there is one."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        found = [process for process in psutil.Process().children(recursive=True) if is_worker(process)]
        if found:
            os.kill(draw.choice(found).pid, signal.SIGKILL)
            return
        time.sleep(0.02)


def is_worker(process: psutil.Process) -> bool:
    """Whether a process is a worker of Ray's that answers questions now."""
    try:
        return " ".join(process.cmdline()).startswith(f"ray::{ACTOR}")
    except psutil.Error:  # it has ended
        return False


def kill(left: Path, runs: Path, limit: int, draw: random.Random) -> bool:
    """Kill a worker and the second node at random moments of a sweep."""
    total = 6 * limit
    with cluster() as found:
        threads = [
            acting(runs, draw.randrange(total // 2), lambda: kill_worker(draw)),
            acting(
                runs,
                draw.randrange(total * 3 // 4),
                lambda: found.remove_node(next(iter(found.worker_nodes)), allow_graceful=False),
            ),
        ]
        sweep(runs, limit, {"engine": "ray", "address": found.address, "batch_size": 2})
        for thread in threads:
            thread.join()
    return stored(runs) == stored(left)


def driver(left: Path, runs: Path, limit: int, draw: random.Random) -> bool:
    """Kill the driver at a random moment, and start it again on the same cluster."""
    with cluster() as found:
        more = {"engine": "ray", "address": found.address, "batch_size": 2}
        process = context.Process(target=sweep, args=(runs, limit, more))
        process.start()
        thread = acting(runs, draw.randrange(1, 6 * limit - 8), process.kill)
        process.join()
        thread.join()
        sweep(runs, limit, more)
    return stored(runs) == stored(left)


def overhead(folder: Path, limit: int | None, repeat: int) -> None:
    """Time `quickstart` with two processes and with two workers of a Ray that is started for it, in turn."""
    seconds: dict[str, list[float]] = {"local": [], "ray": []}
    for number in range(repeat):
        for engine, times in seconds.items():
            runs = folder / f"{engine}-{number}"
            started = time.perf_counter()
            process = context.Process(target=sweep, args=(runs, limit, {"engine": engine, "workers": 2}))
            process.start()
            process.join()
            times.append(time.perf_counter() - started)
            if process.exitcode:
                sys.exit(f"{engine}: exit code {process.exitcode}")
            out.print(f"{engine}: {times[-1]:.1f} s")
        if stored(folder / f"ray-{number}") != stored(folder / f"local-{number}"):
            sys.exit("the two differ")
    local, ray = (min(times) for times in seconds.values())
    asked = load_spec("quickstart")[0].task.limit if limit is None else limit
    out.print(
        f"quickstart with {asked} questions per row: ray {ray:.1f} s / --workers 2 {local:.1f} s = {ray / local:.2f}"
    )


def main() -> None:
    """Run the command line."""
    parser = arguments(__doc__, ("kill", "driver", "overhead"), repeat=10)
    parser.set_defaults(limit=None)
    given = parser.parse_args()
    limit = given.limit or 24
    with tempfile.TemporaryDirectory() as temporary:
        if given.campaign == "overhead":
            overhead(Path(temporary), given.limit, given.repeat)
            return
        trial = {"kill": kill, "driver": driver}[given.campaign]
        left = Path(temporary) / "left"
        sweep(left, limit, {})
        repeated(given, lambda runs, draw: trial(left, runs, limit, draw), "equal to the byte")


if __name__ == "__main__":
    main()
