"""How many processes answer questions, and how many threads each computes with. No stored byte depends on it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qapbench.memory import free_bytes
from qapbench.models.loading import read_config
from qapbench.spec.run_spec import RunSpec

from .plan import Planned
from .settings import Settings

SMALL = 2**18  # weights of the largest linear of a layer up to which a second thread costs more than it computes
ANSWERS = 300
"""Answers of a small model for which another process is started.

Nobody answers while processes start. On two idle cores a second process cost 6 s of start and saved 27 ms per answer
of the embedded model (W4A4, pruned), so it paid from some 230 answers on; 2 x 300 are on the safe side."""


def shared_out(settings: Settings, plans: Sequence[Planned]) -> Settings:
    """The settings with as many processes as pay, if nobody said how many.

    More than one pays where every model is small, so that one process cannot make use of all cores, where enough
    answers are missing, and where memory holds the models.

    Args:
        settings: where and how runs are made.
        plans: the runs that are not done.
    """
    if not settings.may_share or settings.threads not in (None, 1) or settings.device.type != "cpu":
        return settings
    alone = {plan.spec.model: plan.spec for plan in plans}.values()
    if any(threads_of(spec, settings) > 1 for spec in alone):
        return settings
    missing = sum(plan.total - (0 if plan.fresh else plan.answered) for plan in plans)
    count = min(torch.get_num_threads(), missing // ANSWERS)
    while count > 1 and not _fit(plans, dataclasses.replace(settings, workers=count)):
        count -= 1
    return dataclasses.replace(settings, workers=max(1, count))


def _fit(plans: Sequence[Planned], settings: Settings) -> bool:
    """Whether what the processes need is at most half of the memory that is free."""
    from .estimate import estimate

    free = free_bytes(settings.device)
    return free is not None and 2 * max(estimate(plan.spec, settings).total for plan in plans) <= free


def threads_of(spec: RunSpec, settings: Settings) -> int:
    """Threads of each process that answers questions of a run.

    They are what the settings say; else one for a small model on a CPU, whose operations are over before a second
    thread is at work; else all that torch has, shared among the workers. A user's own OMP_NUM_THREADS is what torch
    has, whatever the model's size.

    Args:
        spec: names the model.
        settings: where and how runs are made.
    """
    if settings.threads is not None:
        return settings.threads
    small = settings.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and _is_small(read_config(spec))
    return 1 if small else max(1, torch.get_num_threads() // max(1, settings.workers))


def in_words(specs: Sequence[RunSpec], settings: Settings) -> str:
    """How a command shares its work on this machine, in one line.

    Args:
        specs: the runs, of one model or several.
        settings: where and how they are made.
    """
    if settings.engine != "local":
        return f"{settings.engine}: batches of {settings.batch_size}"
    processes = f"{settings.workers} process{'es' if settings.workers > 1 else ''}"
    if settings.device.type != "cpu":
        several = len(settings.devices) > 1
        shared = f"{len(settings.devices)} devices with one model" if several else settings.device
        return f"{shared}: {processes}, batches of {settings.batch_size}"
    each: dict[int, list[str]] = {}
    for model, spec in {spec.model: spec for spec in specs}.items():
        each.setdefault(threads_of(spec, settings), []).append(Path(model).name)
    counts = [f"{count} thread{'s' if count > 1 else ''}" for count in each]
    if len(each) > 1:
        counts = [f"{said} ({', '.join(models)})" for said, models in zip(counts, each.values(), strict=True)]
    return f"cpu with {os.cpu_count()} cores: {processes} of {' or '.join(counts)}, batches of {settings.batch_size}"


@contextlib.contextmanager
def using_threads(count: int) -> Iterator[None]:
    """While the context is open, torch computes with that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_small(config: Mapping[str, Any]) -> bool:
    """Whether no linear in a layer of decoder or tower has more than SMALL weights, by the model's config.json."""
    parts = [config.get("text_config") or config, config.get("vision_config") or {}]
    sizes = [[int(part.get(name) or 0) for name in ("hidden_size", "intermediate_size")] for part in parts]
    return all(hidden * max(hidden, inner) <= SMALL for hidden, inner in sizes) and all(sizes[0])
