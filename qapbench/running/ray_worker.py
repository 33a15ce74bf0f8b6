"""The worker that lives in a Ray actor. Its module imports no Ray by itself."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from qapbench.errors import Problem, UserError
from qapbench.files import cache_folder, replace_synced
from qapbench.hashing import code_files
from qapbench.methods.plugins import load_plugin_file

from .environment import environment
from .planner import Planner
from .ray_cluster import versions
from .worker import Failure, Order, Worker, failure_of

Sources = dict[str, dict[str, bytes]]
"""Plugin file -> the name of each file that it is made of, beside itself -> content."""


@dataclass(frozen=True)
class Hello:
    """What a new worker says of itself.

    Attributes:
        node: id of its node.
        host: what a user calls the node.
        pid: its process.
        versions: what has to be equal on all nodes.
    """

    node: str
    host: str
    pid: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Sent:
    """An order for workers on other machines.

    Attributes:
        order: the order.
        folder: the working directory, which relative paths in specs start from.
        node: id of the node that sends it.
        sources: the plugins that the order names.
    """

    order: Order
    folder: str
    node: str
    sources: Sources = field(default_factory=dict)


class RayWorker(Worker):
    """A worker in an actor.

    Attributes:
        node: id of its node; "" until it said hello.
    """

    node = ""

    def hello(self) -> Hello:
        """Where this worker is, and with which versions."""
        import ray

        self.node = ray.get_runtime_context().get_node_id()
        return Hello(self.node, ray.util.get_node_ip_address(), os.getpid(), versions())

    def begin(self, sent: Sent) -> Failure | str:
        """Load what an order needs.

        Returns:
            The name of the device, or what is wrong on this node.
        """
        try:
            with contextlib.suppress(OSError):
                os.chdir(sent.folder)
            order = sent.order
            if self.node != sent.node:
                order = _on_this_node(sent)
                _check_content(order)
            self.take(order)
            return str(environment(order.settings.device)["device"])
        except Exception as error:
            return failure_of(error)


def sources_of(plugins: list[str]) -> Sources:
    """What plugin files are made of: themselves, and the files beside them that they import."""
    found: Sources = {}
    for plugin in plugins:
        folder = Path(plugin).resolve().parent
        files = [file for file in code_files(Path(plugin).resolve(), "plugin").values() if file.is_relative_to(folder)]
        found[plugin] = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    return found


def _on_this_node(sent: Sent) -> Order:
    """The order with plugins that were sent along, and with a folder that this node has."""
    places = {plugin: _written(plugin, files) for plugin, files in sent.sources.items()}
    plans = []
    for plan in sent.order.plans:
        plugins = [places.get(plugin, plugin) for plugin in plan.spec.plugins]
        plans.append(replace(plan, spec=plan.spec.model_copy(update={"plugins": plugins})))
    runs = sent.order.settings.runs
    if not runs.is_dir():  # calibrations and features are kept here then
        runs = cache_folder() / "runs"
    settings = replace(sent.order.settings, runs=runs)
    return replace(sent.order, settings=settings, plans=plans, plugins=list(places.values()))


def _written(plugin: str, files: Mapping[str, bytes]) -> str:
    """Write a plugin that was sent along. The folder stays until the machine tidies up."""
    folder = Path(tempfile.mkdtemp(prefix="qapbench-plugin-"))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        replace_synced(folder / name, content)
    if len(files) > 1:  # what it imports from beside itself
        sys.path.insert(0, str(folder))
    return str(folder / Path(plugin).name)


def _check_content(order: Order) -> None:
    """Check that the runs read here what they read where they were planned.

    Raises:
        UserError: a checkpoint, data or a library is missing, or is another one.
    """
    for plugin in order.plugins:
        load_plugin_file(plugin)
    planner = Planner(order.settings.runs, order.settings.device)
    for plan in order.plans:
        mine = planner.plan(plan.spec)
        if mine.id == plan.id:
            continue
        theirs = plan.fingerprints
        names = sorted({*theirs, *mine.fingerprints})
        other = [name for name in names if theirs.get(name) != mine.fingerprints.get(name)]
        raise UserError([Problem(f"'{plan.spec.name}' reads another {name} here") for name in other])
