"""Workers that are actors of a Ray cluster. They may die, and nodes may come and go."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qapbench.errors import RunFailedError, UserError, first_line
from qapbench.visible import visible_logger

from .crew import Event
from .partition import Unit
from .ray_cluster import check_versions, connect, disconnect, import_ray, versions
from .ray_files import SentTrees
from .ray_worker import Begun, Hello, RayWorker, Sent, sources_of
from .sent_files import trees_of
from .settings import Settings
from .worker import Failure, Order

LOG = visible_logger(__name__)
LOOK = 1.0  # seconds between two looks at the nodes
PATIENCE = 600.0  # seconds without any worker, after which the run gives up
SOON = 20.0  # seconds without any worker, after which that is told
STARTS = 4  # workers in a row that may die before they are ready, besides one each
OUT_OF_MEMORY = ("NODE_OUT_OF_MEMORY", "node running low on memory")
"""What Ray says of a worker that its memory monitor killed."""


@dataclass
class _Actor:
    """One actor.

    Attributes:
        handle: Ray's handle of it.
        state: "coming" until it said hello, then "loading", "idle" or "busy".
        waits_for: the reference, or the stream of them, that it will answer with.
        hello: what it said of itself.
        unit: the unit that it has.
    """

    handle: Any
    state: Literal["coming", "loading", "idle", "busy"]
    waits_for: Any
    hello: Hello | None = None
    unit: Unit | None = None

    @property
    def where(self) -> str:
        """What a user calls it."""
        return f"worker {self.hello.pid} on node {self.hello.host}" if self.hello else "a worker that was starting"


class RayCrew:
    """Actors of a Ray cluster, each with a model of its own.

    There are as many as asked for, or as the nodes have room for, which is looked at again every second: a node that
    comes gets workers, and those of a node that goes are started elsewhere, if there is room.

    A Ray that is started here, and its first workers, take seconds in which this process goes on.

    Args:
        settings: where and how runs are made.

    Raises:
        UserError: Ray is not there.
    """

    again = True

    def __init__(self, settings: Settings) -> None:
        self.ray: Any = import_ray()
        self.settings = settings
        self._ours = self._closed = False
        self._starting = ThreadPoolExecutor(1, "start Ray")
        self._started = self._starting.submit(self._connect)
        self._actors: dict[str, _Actor] = {}
        self._nodes: dict[str, str] = {}
        self._devices: set[str] = set()
        self._needs: dict[str, float] = {}
        self._order: Any = None
        self._sent_trees = SentTrees()
        self._number = self._failed = 0
        self._looked = 0.0
        self._alone_since, self._said_alone = time.monotonic(), False

    @property
    def size(self) -> int:
        """Number of workers that are there; before the first, how many are wanted."""
        ready = sum(actor.state in ("idle", "busy") for actor in self._actors.values())
        return ready or self._wanted()

    @property
    def device(self) -> str | None:
        """Names of the devices that the workers compute on."""
        return " and ".join(sorted(self._devices)) or None

    # -- orders and units --

    def _connect(self) -> None:
        self._ours = connect(self.settings.address, self.settings.workers * (self.settings.threads or 1))

    def prepare(self, threads: int) -> None:
        """Begin to start workers as soon as Ray is there. They say hello, and import what they need."""
        before = self._started

        def start() -> None:
            before.result()
            self._start(threads)

        self._started = self._starting.submit(start)

    def _start(self, threads: int) -> None:
        """Start workers, unless there are some of this size."""
        cpus = threads if self.settings.device.type == "cpu" else 1
        smallest = min((int(node["CPU"]) for node in self._alive().values() if node.get("CPU", 0) >= 1), default=cpus)
        needs: dict[str, float] = {"CPU": max(1, min(cpus, smallest))}
        if self.settings.device.type == "cuda":
            needs["GPU"] = self.settings.gpus_per_worker
        if needs != self._needs:
            self._needs = needs
            self._dismiss(self._actors)
        self._look()

    def take(self, order: Order) -> None:
        """Give an order to every worker that there is or will be.

        Raises:
            UserError: the cluster is not there.
            RunFailedError: Ray did not start on this machine.
        """
        self._started.result()
        self._start(order.threads)
        if order.settings.device.type == "cpu":
            order = replace(order, threads=int(self._needs["CPU"]))
        trees = trees_of(plan.spec for plan in order.plans) if order.settings.send_files else {}
        server = self._sent_trees.offer(trees)
        here = self.ray.get_runtime_context().get_node_id()
        sent = Sent(order, str(Path.cwd()), here, sources_of(order.plugins), trees, server)
        self._order = self.ray.put(sent)
        for actor in self._actors.values():
            if actor.hello is not None:
                self._begin(actor)
        self._alone_since = time.monotonic()

    def idle(self) -> Sequence[str]:
        """The workers that wait for a unit."""
        return [name for name, actor in self._actors.items() if actor.state == "idle"]

    def give(self, worker: str, unit: Unit) -> None:
        """Give a unit to a worker."""
        actor = self._actors[worker]
        actor.unit, actor.state = unit, "busy"
        actor.waits_for = actor.handle.answer.options(num_returns="streaming").remote(unit)

    def _begin(self, actor: _Actor) -> None:
        actor.state, actor.unit = "loading", None
        actor.waits_for = actor.handle.begin.remote(self._order)

    def close(self) -> None:
        """End all workers, and a Ray that was started for them.

        The thread that started Ray ends it: the system kills Ray's processes as soon as that thread is gone, and who
        leaves them afterwards waits for them.
        """
        if not self._closed:
            self._closed = True
            self._starting.submit(self._end).result()
            self._starting.shutdown()

    def _end(self) -> None:
        if self.ray.is_initialized():
            self._dismiss(self._actors)
            self._sent_trees.offer({})
            if self._ours:
                disconnect()

    # -- events --

    def events(self, seconds: float) -> Sequence[Event]:
        """What was heard of workers.

        Raises:
            UserError: a node has other versions, or lacks what the order needs.
            RunFailedError: there has been no worker for too long, or those that start die.
        """
        found = []
        if time.monotonic() - self._looked >= LOOK:
            found += self._look()
        waiting = {actor.waits_for: name for name, actor in self._actors.items() if actor.waits_for is not None}
        if not waiting:
            time.sleep(seconds)
            return found
        ready, _ = self.ray.wait(list(waiting), num_returns=1, timeout=0 if found else seconds)
        if ready:  # and whatever else came meanwhile
            ready, _ = self.ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        for reference in ready:
            found += self._heard(waiting[reference])
        return found

    def _heard(self, name: str) -> Iterable[Event]:
        """What a worker answered with."""
        actor = self._actors[name]
        try:
            if actor.state == "busy":
                try:
                    said = self.ray.get(next(actor.waits_for))
                except StopIteration:
                    said = None
            else:
                said = self.ray.get(actor.waits_for)
        except self.ray.exceptions.RayError as error:
            return [self._lost(name, error)]
        if isinstance(said, Hello):
            check_versions(versions(), said.versions, said.host)
            actor.hello = said
            self._begin(actor)
            return []
        if isinstance(said, Begun):
            if said.sent:
                LOG.warning("%s got files of %.2f GB, which it keeps for later runs", actor.where, said.sent / 1e9)
            self._ready(actor, said.device)
            return []
        if isinstance(said, Failure) and said.kind == "told" and isinstance(said.error, UserError):
            said = replace(said, error=_named(said.error, actor))
        unit = actor.unit
        if said is None or isinstance(said, Failure):
            if actor.state == "loading":  # it never had a unit, and cannot get one
                self._actors.pop(name)
                self._count_failure(actor, said.said if said else "")
            actor.state, actor.unit, actor.waits_for = "idle", None, None
        return [Event(name, actor.where, unit, said)]

    def _ready(self, actor: _Actor, device: str) -> None:
        """Note that a worker has loaded the model."""
        actor.state, actor.waits_for, self._failed = "idle", None, 0
        before = self.device
        self._devices.add(device)
        if before is not None and before != self.device:
            LOG.warning("workers compute on %s: their answers may differ in the last bit", self.device)

    def _lost(self, name: str, error: Exception) -> Event:
        """Note that a worker is gone."""
        actor = self._actors.pop(name)
        self._dismiss({name: actor})
        text = str(error)
        memory = isinstance(error, self.ray.exceptions.OutOfMemoryError) or any(word in text for word in OUT_OF_MEMORY)
        gone = actor.hello is not None and actor.hello.node not in self._alive()
        why = "its node is gone" if gone else "out of memory on its node" if memory else _cause(text)
        if actor.state in ("coming", "loading") and not gone:
            self._count_failure(actor, why)
        failure = Failure("memory" if memory else "bug", RuntimeError(f"the worker died ({why})"), text)
        return Event(name, actor.where, actor.unit, failure, lost=True)

    def _count_failure(self, actor: _Actor, why: str) -> None:
        """Note that a worker never became ready.

        Raises:
            RunFailedError: too many in a row did not.
        """
        self._failed += 1
        if self._failed > STARTS + self._wanted():
            raise RunFailedError(
                f"{self._failed} workers in a row died before they were ready, the last one, {actor.where}: {why}"
            )

    # -- nodes --

    def _alive(self) -> dict[str, dict[str, float]]:
        """The resources of each node that is there."""
        return {node["NodeID"]: node["Resources"] for node in self.ray.nodes() if node["Alive"]}

    def _room(self) -> int:
        """Number of workers that all nodes together have room for."""
        needs = self._needs or {"CPU": 1.0}
        return sum(
            min(int(node.get(name, 0) / amount + 1e-9) for name, amount in needs.items())
            for node in self._alive().values()
        )

    def _wanted(self) -> int:
        return self.settings.workers or max(1, self._room())

    def _look(self) -> list[Event]:
        """Look which nodes there are, and start workers where they are wanted.

        Raises:
            RunFailedError: there has been no worker for too long.
        """
        self._looked = time.monotonic()
        nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in self.ray.nodes() if node["Alive"]}
        found = []
        for node in self._nodes.keys() - nodes.keys():
            there = [name for name, actor in self._actors.items() if actor.hello and actor.hello.node == node]
            found += [self._lost(name, RuntimeError("the node is gone")) for name in there]
            LOG.warning(
                "node %s is gone, with %d worker(s); the run goes on with those left, and with new ones where there is "
                "room",
                self._nodes[node],
                len(there),
            )
        self._nodes = nodes
        actor_class = self.ray.remote(
            num_cpus=self._needs["CPU"], num_gpus=self._needs.get("GPU", 0), max_restarts=0, max_task_retries=0
        )(RayWorker)
        while len(self._actors) < self._wanted():
            handle = actor_class.remote()
            self._number += 1
            self._actors[str(self._number)] = _Actor(handle, "coming", handle.hello.remote())
            handle.get_ready.remote()
        self._check_patience()
        return found

    def _check_patience(self) -> None:
        """Tell if there has been no worker for a while.

        Raises:
            RunFailedError: for too long.
        """
        now = time.monotonic()
        if any(actor.state != "coming" for actor in self._actors.values()):
            self._alone_since, self._said_alone = now, False
            return
        needs = " and ".join(f"{amount:g} {name}" for name, amount in self._needs.items())
        why = "no worker has started" if self._room() else f"no node has room for a worker, which needs {needs}"
        if now - self._alone_since > PATIENCE:
            raise RunFailedError(
                f"{why} for {PATIENCE:.0f} s; what was answered is kept, and the same command goes on from there"
            )
        if now - self._alone_since > SOON and not self._said_alone:
            self._said_alone = True
            LOG.warning("%s; waiting for %.0f s", why, PATIENCE)

    def _dismiss(self, actors: dict[str, _Actor]) -> None:
        """End some actors, without waiting for them."""
        for name, actor in list(actors.items()):
            self.ray.kill(actor.handle)
            self._actors.pop(name, None)


def _named(error: UserError, actor: _Actor) -> UserError:
    """An error of a user's that names the node where it was found."""
    host = actor.hello.host if actor.hello else "?"
    return UserError([replace(problem, message=f"{problem.message} (on node {host})") for problem in error.problems])


def _cause(text: str) -> str:
    """What Ray says of a dead worker, in one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "exit type" in line or "dead because" in line]
    return first_line(RuntimeError(telling[-1] if telling else lines[0] if lines else "no reason given"))
