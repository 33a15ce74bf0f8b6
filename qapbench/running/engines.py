"""Where workers run: the settings that a user asks for, and the workers that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qapbench.errors import UserError

from .settings import BATCH, EngineName, Settings, find_device, find_devices

if TYPE_CHECKING:
    from .crew import Crew


def make_settings(
    runs: Path,
    device: str | torch.device | None,
    *,
    batch_size: int = BATCH,
    workers: int | None = None,
    engine: EngineName = "local",
    address: str | None = None,
    gpus_per_worker: float = 1.0,
    send_files: bool = False,
    device_map: str | None = None,
    **more: Any,
) -> Settings:
    """Settings from what a user says.

    Args:
        runs: folder of the results.
        device: name of the device, or the device; None takes a GPU, if there is one.
        batch_size: number of questions answered together.
        workers: number of workers; None is one, and with Ray as many as there is room for.
        engine: where workers run.
        address: address of the Ray cluster.
        gpus_per_worker: share of a GPU that each worker of a Ray cluster has.
        send_files: send checkpoints and data to nodes that do not have them.
        device_map: how a model is spread over several devices; None puts it on one.
        more: further fields of the settings.

    Raises:
        UserError: the device, the address or Ray is not there, or the settings exclude each other.
    """
    if device_map is not None and engine == "ray":
        raise UserError("--device-map: workers of a Ray cluster have one GPU each; leave out --engine ray")
    if device_map is not None and workers is not None and workers > 1:
        raise UserError(f"--device-map: one model takes all GPUs, so --workers {workers} cannot have one each")
    if engine == "ray":
        from .ray_cluster import find_cluster_device

        if not 0 < gpus_per_worker <= 1:
            raise UserError(f"--gpus-per-worker {gpus_per_worker:g}: a model is loaded on one GPU, so at most 1")
        place = find_cluster_device(device, address)
    else:
        if address is not None:
            raise UserError(f"--address {address}: it is the address of a Ray cluster; add --engine ray")
        if send_files:
            raise UserError("--send-files: it is for the nodes of a Ray cluster; add --engine ray")
        place = device if isinstance(device, torch.device) else find_device(device)
    if device_map is not None:
        devices = find_devices(device_map, place)
        place = devices[0]
        more = {**more, "devices": devices, "may_share": False}
    number = (0 if engine == "ray" else 1) if workers is None else workers
    return Settings(
        runs,
        place,
        batch_size,
        number,
        engine,
        address=address,
        gpus_per_worker=gpus_per_worker,
        send_files=send_files,
        **more,
    )


def crew_of(settings: Settings) -> Crew | None:
    """The workers that the settings ask for; None if this process answers by itself."""
    if settings.in_process:
        return None
    if settings.engine == "ray":
        from .ray_crew import RayCrew

        return RayCrew(settings)
    from .processes import Processes

    return Processes(settings.workers, settings.device.type == "cpu")


def crew_ahead(settings: Settings) -> Crew | None:
    """Workers that begin to start before it is known what they will do; None if that saves nothing.

    A Ray that is started here takes seconds, in which this process plans the runs. A cluster is there already.
    """
    return crew_of(settings) if settings.engine == "ray" and settings.address is None else None
