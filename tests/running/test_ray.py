"""Runs on a Ray cluster of two nodes on this machine, whose workers and nodes are killed meanwhile."""

import contextlib
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_process import qapbench as command
from cli_process import started

import qapbench
from qapbench import RunSpec, UserError
from qapbench.errors import RunFailedError
from qapbench.records.progress_note import LOG_FILE
from qapbench.running import execute, ray_cluster, ray_crew, ray_worker
from qapbench.running.planner import Planner
from qapbench.running.settings import Settings
from qapbench.running.worker import Failure, Order

FILES = ("answers.jsonl", "receipt.json", "scored.jsonl")
W4A4 = {"method": "rtn", "weights": {"bits": 4, "group_size": 16}, "activations": {"bits": 4, "group_size": 16}}
SLOW = """
import time
from pathlib import Path

from torch import Tensor

from qapbench import metric


CALLS = []


@metric("slow")
def slow(tokens: Tensor) -> Tensor:
    '''Norm of a token, which takes its time; from the third image on it waits as long as a file is there.'''
    CALLS.append(1)
    time.sleep(0.03)
    while len(CALLS) > 2 and Path(HOLD).exists():
        time.sleep(0.01)
    return tokens.norm(dim=-1)
"""
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def sweep(tiny_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Six rows, of which three wait in a plugin, so that there is time to kill somebody."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "slow_metric.py").write_text(SLOW.replace("HOLD", repr(str(folder / "hold"))))
    base = {"model": str(tiny_model), "task": {"name": "scienceqa", "data": str(questions)}}
    slow = {
        "prune": {"method": "cdpruner", "keep": 5, "sensitivity": "slow"},
        "plugins": [str(folder / "slow_metric.py")],
    }
    rows = [
        {},
        slow,
        {"quantize": W4A4},
        {"quantize": W4A4, **slow},
        {"quantize": {"method": "rtn", "weights": {"bits": 3}}, **slow},
        {"quantize": W4A4, "prune": {"method": "random", "keep": 4}},
    ]
    return [{"name": f"row {at}", **base, **row} for at, row in enumerate(rows)]


def made(specs: list[dict[str, Any]], runs: Path, **more: Any) -> list[dict[str, bytes]]:
    records = qapbench.run([RunSpec.parse(spec) for spec in specs], runs, progress=False, **more)
    return [{name: (runs / record.run_id / name).read_bytes() for name in FILES} for record in records]


@pytest.fixture(scope="module")
def alone(sweep: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    return made(sweep, tmp_path_factory.mktemp("alone"))


SMALL: dict[str, Any] = {
    "num_cpus": 1,
    "object_store_memory": 80 << 20,
    "include_dashboard": False,
    "include_log_monitor": False,
    "no_monitor": True,
}
"""A node with one core, and without processes that nothing here asks."""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home folder on the second node, where paths that begin with ~ lead nowhere."""
    return tmp_path_factory.mktemp("elsewhere") / "home"


@pytest.fixture(scope="module")
def cluster(elsewhere: Path) -> Iterator[Any]:
    """Two nodes with one core each; this process is on the first."""
    pytest.importorskip("ray")
    ray_cluster.import_ray()
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args=SMALL)
    found.add_node(**SMALL, env_vars={"HOME": str(elsewhere), "XDG_CACHE_HOME": str(elsewhere / "cache")})
    yield found
    ray_cluster.disconnect()
    found.shutdown()


@contextlib.contextmanager
def holding_this_node(cluster: Any) -> Iterator[None]:
    """While the context is open, the core of the first node is taken, so that workers are on the second."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Idle:
        """Does nothing."""

    ray_cluster.connect(cluster.address)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    idle = ray.remote(num_cpus=1, scheduling_strategy=here)(Idle).remote()
    ray.get(idle.__ray_ready__.remote())
    yield
    ray.kill(idle)


def answered(runs: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in runs.glob("*/answers.jsonl"))


def when(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Act in another thread as soon as a condition holds."""

    def wait() -> None:
        until = time.monotonic() + 400
        while not condition() and time.monotonic() < until:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_node_without_the_files_gets_them(
    sweep: Any, alone: Any, cluster: Any, elsewhere: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the second node has a core for a worker then."""

    def from_home(path: str) -> str:
        return f"~/{os.path.relpath(path, Path.home().resolve())}"

    task = {"name": "scienceqa", "data": from_home(sweep[0]["task"]["data"])}
    spec = {**sweep[0], "model": from_home(sweep[0]["model"]), "task": task}
    more = {"engine": "ray", "address": cluster.address, "workers": 1, "send_files": True}
    with holding_this_node(cluster), caplog.at_level(logging.WARNING):
        assert made([spec], tmp_path, **more) == alone[:1]
    assert "got files of" in caplog.text
    kept = {path.name for path in elsewhere.rglob("*") if path.is_file() and "sent" in path.parts}
    assert kept >= {"config.json", "model.safetensors", "test.parquet"}


def test_an_actor_and_a_node_that_are_killed_change_no_byte(
    sweep: Any,
    alone: Any,
    cluster: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The plugin travels to the second node, where it is not looked for by its path. No worker is nicer than this."""
    crews, niceness = list[Any](), list[int]()
    take = ray_crew.RayCrew.take
    monkeypatch.setattr(ray_crew.RayCrew, "take", lambda self, order: crews.append(self) or take(self, order))

    def kill_actor() -> None:
        ready = [actor.hello.pid for actor in [*crews[0]._actors.values()] if actor.state in ("idle", "busy")]
        niceness.append(os.getpriority(os.PRIO_PROCESS, ready[0]))
        os.kill(ready[0], signal.SIGKILL)

    def kill_node() -> None:
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)

    first = when(lambda: answered(tmp_path) >= 10, kill_actor)
    second = when(lambda: answered(tmp_path) >= 30, kill_node)
    with caplog.at_level(logging.WARNING):
        assert made(sweep, tmp_path, engine="ray", address=cluster.address) == alone
    first.join()
    second.join()
    assert niceness == [os.getpriority(os.PRIO_PROCESS, 0)]
    assert "the worker died" in caplog.text
    assert "another worker goes on" in caplog.text  # of each that was answering: one that waited has nothing to hand on
    assert "the worker died" in (tmp_path / LOG_FILE).read_text()
    cluster.add_node(**SMALL)


def test_a_driver_that_is_killed_is_started_again(sweep: Any, alone: Any, cluster: Any, tmp_path: Path) -> None:
    """Its worker is in the middle of the run then."""
    (plugin,) = sweep[3]["plugins"]
    hold, runs = Path(plugin).with_name("hold"), tmp_path / "runs"
    (tmp_path / "spec.yaml").write_text(json.dumps(sweep[3]))
    hold.touch()
    ray_run = ["--engine", "ray", "--address", cluster.address, "--workers", 1, "--batch-size", 1, "--runs", runs]
    process = started("run", tmp_path / "spec.yaml", *ray_run)
    when(lambda: answered(runs) >= 2 or not process.is_alive(), process.kill).join()
    process.join()
    hold.unlink()
    assert 2 <= answered(runs) < 14
    assert made(sweep[3:4], runs, engine="ray", address=cluster.address, workers=1) == alone[3:4]


def test_a_node_with_other_versions_is_refused(
    sweep: Any, cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = re.escape(torch.__version__)
    monkeypatch.setattr(ray_crew, "versions", lambda: {**ray_cluster.versions(), "torch": "1.0"})
    with pytest.raises(UserError, match=rf"node \S+ has torch {here}, and this machine has 1\.0"):
        made(sweep[:1], tmp_path, engine="ray", address=cluster.address, workers=1)


# -- without a cluster --


def sent(spec: dict[str, Any], runs: Path) -> ray_worker.Sent:
    settings = Settings(runs, torch.device("cpu"))
    plan = Planner(runs, settings.device).plan(RunSpec.parse(spec))
    return ray_worker.Sent(Order(settings, [plan], [], 1), str(runs), "here")


def test_a_node_without_the_checkpoint_or_with_another_says_so(sweep: Any, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(sweep[0]["model"], tmp_path / "model")
    order = sent({**sweep[0], "model": str(folder)}, tmp_path)
    worker = ray_worker.RayWorker()
    worker.node = "there"
    assert isinstance(worker.begin(order), ray_worker.Begun)
    config = folder / "config.json"
    config.write_text(config.read_text() + "\n")
    found = worker.begin(order)
    assert isinstance(found, Failure)
    hint = "; --send-files sends checkpoints and data"
    assert (found.kind, str(found.error)) == ("told", f"'row 0' reads another model here{hint}")
    shutil.rmtree(folder)
    found = worker.begin(order)
    assert isinstance(found, Failure)
    assert found.kind == "told"
    assert str(folder) in str(found.error)
    hello = ray_worker.Hello("there", "10.0.0.7", 5, {})
    named = ray_crew._named(found.error, ray_crew._Actor(None, "loading", None, hello))
    assert "\n" not in str(named)
    assert str(named).endswith(f"{hint} (on node 10.0.0.7)")


def test_a_plugin_is_sent_with_the_files_beside_it(sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    plugin = tmp_path / "plugin.py"
    plugin.write_text("import beside_plugin\n")
    (tmp_path / "beside_plugin.py").write_text("A = 1\n")
    (tmp_path / "nothing.py").write_text("B = 2\n")
    (slow,) = sweep[1]["plugins"]
    sources = ray_worker.sources_of([str(plugin), slow])
    assert {Path(name).name: sorted(files) for name, files in sources.items()} == {
        "plugin.py": ["beside_plugin.py", "plugin.py"],
        "slow_metric.py": ["slow_metric.py"],
    }
    there = ray_worker._on_this_node(replace(sent(sweep[1], tmp_path), sources=sources), {})
    copy, slow_copy = map(Path, there.plugins)
    assert there.plans[0].spec.plugins == [str(slow_copy)] != [slow]
    assert slow_copy.read_text() == Path(slow).read_text()
    assert (copy.parent / "beside_plugin.py").read_text() == "A = 1\n"
    assert str(copy.parent) in sys.path  # so that the plugin finds it


def test_without_ray_the_command_that_installs_it_is_told(
    sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray is not installed; pip install 'qapbench\[ray\]'"):
        made(sweep[:1], tmp_path, engine="ray")


def test_a_machine_that_is_too_busy_to_start_ray_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises an Exception then, which is nothing else."""
    ray = pytest.importorskip("ray")

    def late(**more: Any) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", late)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(RunFailedError, match=r"did not start on this machine \(The current node timed out"):
        ray_cluster.connect(None)


def test_a_ray_of_its_own_makes_the_same_bytes(sweep: Any, alone: Any, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    (tmp_path / "spec.yaml").write_text(json.dumps(sweep[2]))
    done = command("run", tmp_path / "spec.yaml", "--engine", "ray", "--workers", 1, "--runs", tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    (folder,) = (path.parent for path in (tmp_path / "runs").glob("*/record.json"))
    assert {name: (folder / name).read_bytes() for name in FILES} == alone[2]


def test_a_ray_of_its_own_starts_no_process_that_nothing_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    node = pytest.importorskip("ray._private.node").Node

    def helpers() -> list[Any]:
        return [getattr(node, name) for name in ray_cluster.HELPERS]

    kept, meanwhile = helpers(), list[Any]()
    monkeypatch.setattr(ray, "init", lambda **_: meanwhile.extend(helpers()))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    ray_cluster.connect("127.0.0.1:1")  # another's cluster stays as it is
    assert meanwhile == kept
    ray_cluster.connect(None)
    assert [one(node) for one in meanwhile[len(kept) :]] == [None] * len(kept)
    assert helpers() == kept


def test_a_ray_of_its_own_is_ended_by_the_thread_that_started_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes are killed as soon as that thread is gone; leaving them would take five seconds then."""
    ray = pytest.importorskip("ray")
    threads: list[threading.Thread] = []

    def here(*_: Any) -> bool:
        threads.append(threading.current_thread())
        return True

    monkeypatch.setattr(ray_crew, "connect", here)
    monkeypatch.setattr(ray_crew, "disconnect", here)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    ray_crew.RayCrew(Settings(tmp_path, torch.device("cpu"), engine="ray")).close()
    first, second = threads
    assert first is second


def test_a_ray_that_begins_ahead_is_ended_and_begins_only_where_there_is_something_to_do(
    sweep: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    crews: list[SimpleNamespace] = []

    def ahead(settings: Settings) -> SimpleNamespace:
        crew = SimpleNamespace(closed=False)
        crew.close = lambda: setattr(crew, "closed", True)
        crews.append(crew)
        return crew

    qapbench.run(RunSpec.parse(sweep[0]), tmp_path / "done", progress=False)
    monkeypatch.setattr(execute, "crew_ahead", ahead)
    with pytest.raises(UserError, match="nothing-here"):  # found while the runs are planned
        made([{**sweep[0], "model": str(tmp_path / "nothing-here")}], tmp_path / "runs", engine="ray")
    assert [crew.closed for crew in crews] == [True]
    made(sweep[:1], tmp_path / "done", engine="ray")
    assert len(crews) == 1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"engine": "ray", "address": "ray://head:10001"}, "start the command on a node of the cluster"),
        ({"address": "auto"}, "add --engine ray"),
        ({"send_files": True}, "add --engine ray"),
        ({"engine": "ray", "gpus_per_worker": 2.0}, "a model is loaded on one GPU, so at most 1"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(sweep: Any, tmp_path: Path, more: dict[str, Any], said: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=said):
        made(sweep[:1], tmp_path, **more)
