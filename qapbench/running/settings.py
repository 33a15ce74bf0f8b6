"""How runs are made on this machine: nothing here enters a run's identity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from qapbench.errors import UserError

EngineName = Literal["local", "ray"]
BATCH = 8
DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True)
class Settings:
    """Where and how runs are made.

    Attributes:
        runs: folder of the results.
        device: that the model is put on.
        batch_size: questions taken up together; no answer depends on it.
        workers: processes that share the questions.
        engine: where workers run; only processes of this machine so far.
        spill: keep image features that wait for another quantizer in a file below `runs`.
        trust_remote_code: let a checkpoint run its own Python code.
    """

    runs: Path
    device: torch.device
    batch_size: int = BATCH
    workers: int = 1
    engine: EngineName = "local"
    spill: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.engine == "ray":
            raise UserError(
                "--engine ray: not verified yet, so it is refused; --workers N uses this machine's processes"
            )


def find_device(name: str | None) -> torch.device:
    """The device of that name; a GPU where there is one and no name is given.

    Raises:
        UserError: this machine has no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in DEVICES:
            raise RuntimeError
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # an AssertionError is what torch without CUDA raises
        raise UserError(f"device: this machine has no '{name}'; try cpu or cuda") from None
    return device
