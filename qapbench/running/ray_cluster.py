"""Finds a Ray cluster, and checks that its nodes are like this machine. Ray is imported when it is asked for."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qapbench.errors import Problem, RunFailedError, UserError, first_line
from qapbench.hashing import digest_files, installed_version
from qapbench.memory import check_device

from .environment import PACKAGES
from .settings import DEVICES, find_device

if TYPE_CHECKING:
    from types import ModuleType

INSTALL = "--engine ray: Ray is not installed; pip install 'qapbench[ray]'"
STORE = 200 << 20  # bytes of the object store of a Ray that is started here; orders and answers are small
HELPERS = ("start_monitor", "start_api_server", "start_log_monitor")
"""What starts processes of a Ray that nothing here asks: the autoscaler, the server of the dashboard that is switched
off, and what brings the workers' logs to the driver. Each imports Ray, which takes a second of a core."""
COMPARED = ("python", "qapbench", "torch", "transformers", "lm-eval", "tokenizers", "numpy", "pillow", "ray")
"""What has to have one version on all nodes."""
SOURCE = "qapbench's source"


def import_ray() -> ModuleType:
    """Ray, which reports nothing to anybody. If it is started here, its workers compete for the cores like any process.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # by default 15: a worker waits for minutes on a busy machine
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray will do soon; else it warns
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise UserError(INSTALL) from None


def connect(address: str | None, cpus: int = 1) -> bool:
    """Connect this process to a Ray cluster, unless it is connected.

    Args:
        address: address of the cluster, or "auto"; None starts Ray on this machine.
        cpus: number of cores that a Ray which is started here gives out at least.

    Returns:
        Whether it was not connected before.

    Raises:
        UserError: there is no such cluster, or it runs another version of Ray or Python.
        RunFailedError: Ray did not start on this machine.
    """
    ray = import_ray()
    if address is not None and address.startswith("ray://"):
        raise UserError(f"--address {address}: start the command on a node of the cluster, with --address auto")
    if ray.is_initialized():
        return False
    _quieten()
    mine: dict[str, Any] = {"address": address}
    starting: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if address is None:
        cores = max(cpus, os.cpu_count() or 1)
        mine = {"address": "local", "num_cpus": cores, "object_store_memory": STORE, "include_dashboard": False}
        starting = _without_helpers()
    try:
        with starting:
            ray.init(**mine, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"--address {address}: no Ray cluster is there ({first_line(error)})") from None
    except RuntimeError as error:
        if "ersion mismatch" not in str(error):
            raise
        raise UserError(f"--address {address}: {' '.join(str(error).split())}") from None
    except Exception as error:
        if address is not None or type(error) is not Exception:
            raise
        raise RunFailedError(  # Ray waits for 30 s, and what it raises then has no class of its own
            f"Ray did not start on this machine ({first_line(error)}); it may be too busy: run the same command again"
        ) from None
    return True


def _quieten() -> None:
    """Keep what Ray prints of a dead worker or node off standard output, where tables go: the run tells it itself."""
    inside: Any = importlib.import_module("ray._private.worker")
    if hasattr(inside, "print_to_stdstream"):
        inside.print_to_stdstream = _nothing


def _nothing(*_: Any, **__: Any) -> None:
    """Do nothing."""


@contextlib.contextmanager
def _without_helpers() -> Iterator[None]:
    """While the context is open, a Ray that starts leaves out the `HELPERS`; `ray.init` has no option for them.

    A version of Ray that starts them in another way starts them all.
    """
    node: Any = None
    with contextlib.suppress(ImportError, AttributeError):
        node = importlib.import_module("ray._private.node").Node
    before = {name: getattr(node, name) for name in HELPERS if hasattr(node, name)}
    for name in before:
        setattr(node, name, _nothing)
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(node, name, method)


def disconnect() -> None:
    """Leave the cluster. A Ray that was started by `connect` ends."""
    import_ray().shutdown()


def find_cluster_device(device: str | torch.device | None, address: str | None) -> torch.device:
    """The kind of device that workers of a cluster compute on.

    Args:
        device: name of the device; None takes GPUs, if the cluster has any.
        address: address of the cluster; None is this machine.

    Raises:
        UserError: Ray or the cluster is not there, or there is no such kind of device.
    """
    ray = import_ray()
    if address is None and not ray.is_initialized():
        return device if isinstance(device, torch.device) else find_device(device)
    connect(address)
    if device is None:
        return torch.device("cuda" if ray.cluster_resources().get("GPU", 0) else "cpu")
    kind = str(device).partition(":")[0]
    check_device(kind)
    if kind not in DEVICES:
        raise UserError(f"device: there is no '{device}'; try cpu or cuda")
    return torch.device(kind)


@functools.cache
def versions() -> dict[str, str]:
    """What has to be equal on all nodes: versions of Python and of packages, and the source of qapbench."""
    import ray

    import qapbench

    found = {"python": platform.python_version(), "ray": ray.__version__}
    found |= {package: installed_version(package) for package in PACKAGES}
    roots = [*qapbench.__path__]
    for name in ("strategies", "tasks"):  # they lie beside the package where it is not installed as a wheel
        roots += importlib.import_module(f"qapbench.{name}").__path__
    files = {str(file.relative_to(root)): file for root in map(Path, roots) for file in root.rglob("*.py")}
    return {**{name: str(found[name]) for name in COMPARED}, SOURCE: digest_files(files)[:12]}


def check_versions(here: Mapping[str, str], there: Mapping[str, str], node: str) -> None:
    """Check that a node has the versions of this machine.

    Args:
        here: this machine's `versions`.
        there: the node's.
        node: what a user calls the node.

    Raises:
        UserError: some differ; each is named with both versions.
    """
    wrong = [
        Problem(f"node {node} has {name} {there.get(name, 'not installed')}, and this machine has {version}")
        for name, version in here.items()
        if there.get(name) != version
    ]
    if wrong:
        raise UserError(wrong)
