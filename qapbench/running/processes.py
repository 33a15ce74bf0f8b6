"""Workers that are processes of this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from qapbench.errors import RunFailedError

from .crew import Event
from .partition import Unit
from .worker import IMPORTED, Failure, Order, Part, Worker, failure_of

LEAVE = 2  # seconds in which a worker that nobody gives work may end by itself
STOP = 5  # seconds in which a worker that is stopped may end by itself


@dataclass
class _Member:
    """One process, the pipe to it, and the unit that it has."""

    process: BaseProcess
    pipe: Connection
    unit: Unit | None = None


class Processes:
    """Worker processes of this machine. With GPUs, each has its own as far as they suffice.

    On a CPU they are forked from one process that did nothing but import what all of them need. That takes seconds of
    a processor and hundreds of MB, which are then spent once. Where GPUs compute, and on other systems than Linux,
    each is spawned. None is a fork of this process, whose locks and GPU contexts it would share.

    Args:
        count: number of processes.
        on_cpu: whether they compute on the CPU.
    """

    again = False
    device = None

    def __init__(self, count: int, on_cpu: bool = True) -> None:
        self.size = count
        self._on_cpu = on_cpu
        self._members: dict[str, _Member] = {}

    def prepare(self, threads: int) -> None:
        """Begin to import what workers need, where they are forked from one process."""
        if not self._members and isinstance(_context(self._on_cpu), ForkServerContext):
            ensure_running()

    def take(self, order: Order) -> None:
        """Start the processes if there are none, and give each the order."""
        context = _context(self._on_cpu)
        for index in range(self.size if not self._members else 0):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, dict(os.environ)), daemon=True)
            process.start()
            theirs.close()  # so that the death of the process closes the pipe
            self._members[str(index)] = _Member(process, mine)
        for index, member in enumerate(self._members.values()):
            settings = order.settings
            if settings.device.type == "cuda":
                own = torch.device(f"cuda:{index % torch.cuda.device_count()}")
                settings = dataclasses.replace(settings, device=own)
            self._send(member, dataclasses.replace(order, settings=settings))

    def idle(self) -> Sequence[str]:
        """The processes that have no unit. One that still loads the model does the first afterwards."""
        return [name for name, member in self._members.items() if member.unit is None]

    def give(self, worker: str, unit: Unit) -> None:
        """Give a unit to a process."""
        self._members[worker].unit = unit
        self._send(self._members[worker], unit)

    def events(self, seconds: float) -> Sequence[Event]:
        """What processes said.

        Raises:
            RunFailedError: a process died.
        """
        of = {member.pipe: (name, member) for name, member in self._members.items()}
        found = []
        for pipe in wait(list(of), timeout=seconds):
            name, member = of[pipe]  # type: ignore[index]
            said, unit = _received(member), member.unit
            if not isinstance(said, Part):
                member.unit = None
            found.append(Event(name, f"worker {name}", unit, said))
        return found

    def close(self) -> None:
        """End the processes. One that waits for a unit ends by itself, and takes what it shares with it."""
        running = [member for member in self._members.values() if member.process.pid is not None]
        for member in running:
            if member.unit is None:
                member.pipe.close()
        until = time.monotonic() + LEAVE
        for member in running:
            if member.unit is None:
                member.process.join(max(0.0, until - time.monotonic()))
            member.process.terminate()
        for member in running:
            member.process.join(STOP)
            if member.process.is_alive():
                member.process.kill()
                member.process.join()
        self._members = {}

    def _send(self, member: _Member, what: Order | Unit) -> None:
        with contextlib.suppress(OSError):  # it is dead, which `events` finds out
            member.pipe.send(what)


def _context(on_cpu: bool) -> SpawnContext | ForkServerContext:
    """How processes are started."""
    if not on_cpu or sys.platform != "linux":  # macOS' frameworks do not outlive a fork
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, *IMPORTED])
    return context


def _received(member: _Member) -> Part | Failure | None:
    """What a process said."""
    try:
        said: Part | Failure | None = member.pipe.recv()
        return said
    except (EOFError, OSError):
        pass
    member.process.join()
    code = member.process.exitcode or 0
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    raise RunFailedError(
        f"a worker process died ({how}; out of memory?); what was answered is kept: run the same command again, "
        "perhaps with fewer --workers"
    )


def _serve(pipe: Any, environment: dict[str, str]) -> None:
    """Do what comes through the pipe, and send what is found. This is a process of its own.

    Args:
        pipe: to the process that gives the work.
        environment: that of the same process; the one that this was forked from may have had another.
    """
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that gives the work ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    worker = Worker()
    with contextlib.suppress(EOFError, OSError):  # nobody listens any more
        while True:
            what = pipe.recv()
            if isinstance(what, Order):
                try:
                    worker.take(what)
                except Exception as error:
                    pipe.send(failure_of(error))
                    return
            else:
                ended = True
                for found in worker.answer(what):
                    pipe.send(found)
                    ended = not isinstance(found, Failure)
                if ended:
                    pipe.send(None)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: nobody would wait for its answers."""
    if parent := parent_process():
        parent.join()
        os._exit(1)
