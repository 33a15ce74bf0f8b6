"""The worker that lives in a Ray actor. Its module imports no Ray by itself."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qapbench.errors import Problem, UserError
from qapbench.files import cache_folder, replace_synced
from qapbench.hashing import code_files
from qapbench.methods.plugins import load_plugin_file

from .environment import name_of
from .planner import Planner
from .ray_cluster import versions
from .ray_files import asking
from .sent_files import Tree, lacks, received, with_places
from .worker import IMPORTED, Failure, Order, Worker, failure_of

SENDS = "; --send-files sends checkpoints and data"
"""What helps a node that lacks some."""
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
        trees: what the specs name and a node may ask for if it lacks it, by name.
        server: Ray's handle of the `FileServer` that has them; None if nothing is sent.
    """

    order: Order
    folder: str
    node: str
    sources: Sources = field(default_factory=dict)
    trees: dict[str, Tree] = field(default_factory=dict)
    server: Any = None


@dataclass(frozen=True)
class Begun:
    """What a worker says when it has loaded what an order needs.

    Attributes:
        device: name of its device.
        sent: bytes of files that were sent to it.
    """

    device: str
    sent: int = 0


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

    def get_ready(self) -> None:
        """Import what orders will need, which takes seconds."""
        for module in IMPORTED:
            importlib.import_module(module)

    def begin(self, sent: Sent) -> Failure | Begun:
        """Load what an order needs.

        Returns:
            That it is there, or what is wrong on this node.
        """
        try:
            with contextlib.suppress(OSError):
                os.chdir(sent.folder)
            order, count = sent.order, 0
            if self.node != sent.node:
                places, count = _places(sent)
                order = _on_this_node(sent, places)
                _check_content(order, hint="" if sent.server else SENDS)
            self.take(order)
            return Begun(name_of(order.settings.device), count)
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


def _places(sent: Sent) -> tuple[dict[str, str], int]:
    """Where on this node the files are that it lacked, by the names in the specs, and how many bytes of them were sent.

    Raises:
        UserError: there is no room for them, or they arrived with another content.
    """
    import ray

    places, total = dict[str, str](), 0
    for name, tree in sent.trees.items():
        if lacks(name, tree):
            place, size = received(tree, asking(sent.server, tree), ray.get)
            places[name], total = str(place), total + size
    return places, total


def _on_this_node(sent: Sent, places: Mapping[str, str]) -> Order:
    """The order with plugins and files that were sent along, and with a folder that this node has."""
    written = {plugin: _written(plugin, files) for plugin, files in sent.sources.items()}
    plans = []
    for plan in sent.order.plans:
        plugins = [written.get(plugin, plugin) for plugin in plan.spec.plugins]
        spec = with_places(plan.spec, places).model_copy(update={"plugins": plugins})
        plans.append(replace(plan, spec=spec))
    runs = sent.order.settings.runs
    if not runs.is_dir():  # calibrations and features are kept here then
        runs = cache_folder() / "runs"
    settings = replace(sent.order.settings, runs=runs)
    return replace(sent.order, settings=settings, plans=plans, plugins=list(written.values()))


def _written(plugin: str, files: Mapping[str, bytes]) -> str:
    """Write a plugin that was sent along. The folder stays until the machine tidies up."""
    folder = Path(tempfile.mkdtemp(prefix="qapbench-plugin-"))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        replace_synced(folder / name, content)
    if len(files) > 1:  # what it imports from beside itself
        sys.path.insert(0, str(folder))
    return str(folder / Path(plugin).name)


def _check_content(order: Order, hint: str) -> None:
    """Check that the runs read here what they read where they were planned.

    Args:
        order: the order.
        hint: what may help, behind each message.

    Raises:
        UserError: a checkpoint, data or a library is missing, or is another one.
    """
    for plugin in order.plugins:
        load_plugin_file(plugin)
    planner = Planner(order.settings.runs, order.settings.device)
    for plan in order.plans:
        try:
            mine = planner.plan(plan.spec)
        except UserError as error:
            told = [replace(problem, message=f"{problem.message}{hint}") for problem in error.problems]
            raise UserError(told) from None
        if mine.id == plan.id:
            continue
        theirs = plan.fingerprints
        names = sorted({*theirs, *mine.fingerprints})
        other = [name for name in names if theirs.get(name) != mine.fingerprints.get(name)]
        raise UserError([Problem(f"'{plan.spec.name}' reads another {name} here{hint}") for name in other])
