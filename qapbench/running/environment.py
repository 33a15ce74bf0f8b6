"""Describes the machine and the libraries that made a result."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qapbench.hashing import installed_version

PACKAGES = ("qapbench", "torch", "transformers", "lm-eval", "tokenizers", "numpy", "pillow")


def environment(*devices: torch.device) -> dict[str, Any]:
    """Versions, machine and settings that a result may depend on.

    Args:
        devices: the device that holds the model, or those that share it.
    """
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform(terse=True)}
    found |= {package: installed_version(package) for package in PACKAGES}
    found["device"] = name_of(*devices)
    found["threads"] = torch.get_num_threads()
    found["git"] = _git()
    return found


def name_of(*devices: torch.device) -> str:
    """What a device, or several that share a model, is called."""
    return _gpus(devices) if devices[0].type == "cuda" else _cpu()


def _gpus(devices: Sequence[torch.device]) -> str:
    names = Counter(torch.cuda.get_device_name(device) for device in devices)
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in names.items())


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"cpu: {line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"cpu: {platform.processor() or platform.machine()}, {os.cpu_count()} cores"


@functools.cache
def _git() -> str | None:
    """Commit of the checkout that runs; None for an installed wheel.

    "(dirty)" follows it if tracked files were changed. It is asked for once per process, whose code does not change.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10
        )
        status = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + (" (dirty)" if status.stdout.strip() else "") or None
