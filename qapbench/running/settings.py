"""Settings of how runs are made on this machine. None of them changes a run's identity, except the kind of device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from qapbench.errors import UserError, nearest
from qapbench.memory import check_device

EngineName = Literal["local", "ray"]
BATCH = 8  # questions answered together by default
DEVICES = ("cpu", "cuda", "xpu")
DEVICE_MAPS = ("auto",)  # ways to spread a model over several devices


@dataclass(frozen=True)
class Settings:
    """Where and how runs are made.

    Attributes:
        runs: folder of the results.
        device: the device that holds the model, or the first of those that share it.
        devices: the devices that share the model, one or several, and that leave what they have no room for in its
            files; empty if `device` has all of it.
        batch_size: number of questions answered together; no answer depends on it.
        workers: number of workers that share the questions. 0, with Ray: as many as the cluster has room for.
        engine: where workers run: "local" is processes of this machine, "ray" a Ray cluster.
        spill: keep image features for later quantizers in a file below `runs`.
        offload: leave the decoder's weights in their files, where every forward pass reads them.
        trust_remote_code: let a checkpoint run its own Python code.
        threads: threads of each process on a CPU; None chooses them by the model's size.
        address: address of the Ray cluster; None starts Ray on this machine.
        gpus_per_worker: share of a GPU that each worker of a Ray cluster has to itself.
        send_files: send checkpoints and data to nodes of a Ray cluster that do not have them.
        may_share: whether more local workers may be started where that pays, because nobody said how many.
    """

    runs: Path
    device: torch.device
    batch_size: int = BATCH
    workers: int = 1
    engine: EngineName = "local"
    spill: bool = False
    offload: bool = False
    trust_remote_code: bool = False
    threads: int | None = None

    address: str | None = None
    gpus_per_worker: float = 1.0
    send_files: bool = False
    may_share: bool = False
    devices: tuple[torch.device, ...] = ()

    @property
    def held_on(self) -> tuple[torch.device, ...]:
        """The devices that hold a model."""
        return self.devices or (self.device,)

    @property
    def in_process(self) -> bool:
        """Whether this process answers by itself."""
        return self.engine == "local" and self.workers == 1

    def of_a_worker(self) -> Settings:
        """The settings of one worker, which answers by itself."""
        return replace(self, workers=1, may_share=False, engine="local")


def find_device(name: str | None) -> torch.device:
    """The device with that name. If None: a GPU, if there is one, otherwise the CPU.

    Raises:
        UserError: this machine has no such device, or it is "mps".
    """
    check_device((name or "").partition(":")[0])
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in DEVICES:
            raise RuntimeError
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # torch without CUDA raises an AssertionError
        raise UserError(f"device: this machine has no '{name}'; try cpu or cuda") from None
    return device


def find_devices(device_map: str, first: torch.device) -> tuple[torch.device, ...]:
    """The devices that share a model.

    Args:
        device_map: how it is spread over them, "auto".
        first: a device of their kind.

    Returns:
        All devices of that kind.

    Raises:
        UserError: there is no such way, the device is a CPU or a certain one, or accelerate is not installed.
    """
    if device_map not in DEVICE_MAPS:
        raise UserError(f"--device-map: no way '{device_map}'; {nearest(device_map, DEVICE_MAPS)}")
    if first.type == "cpu":
        raise UserError("--device-map: it spreads a model over GPUs, and the device is the CPU; leave it out")
    if first.index is not None:
        raise UserError(f"--device-map: it uses every {first.type}, and --device {first} is a certain one; name one")
    if find_spec("accelerate") is None:
        raise UserError("--device-map: it needs the package accelerate; pip install accelerate")
    return tuple(torch.device(first.type, index) for index in range(getattr(torch, first.type).device_count()))
