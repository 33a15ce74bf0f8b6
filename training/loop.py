"""The training loop that all stages share, with a budget of wall time, checkpoints and a learning curve."""

from __future__ import annotations

import contextlib
import ctypes
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .muon import build_optimizer


class Stage(Protocol):
    """One stage of the training.

    Attributes:
        name: name of the stage, and of its checkpoint.
        trained: the modules that are trained, by the name under which a checkpoint stores them.
    """

    name: str
    trained: dict[str, nn.Module]

    def loss(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss of one batch.

        Args:
            step: number of the step. The batch depends only on the seed, the step and the rank of the process.
            progress: share of the stage's budget that is used up.

        Returns:
            The loss, and values to log.
        """
        ...

    def validate(self) -> dict[str, Any]:
        """Evaluate on the validation split. The result is logged in the learning curve."""
        ...


def keep_heap() -> None:
    """Make glibc keep freed memory. Page faults of new buffers otherwise take a fifth of a step on a CPU."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            libc.mallopt(option, value)


def schedule(progress: float, step: int) -> float:
    """Factor of the learning rate: linear warm-up in 60 steps, then 1, then linear decay in the last 60 % of time."""
    return min(1.0, (step + 1) / 60) * min(1.0, max(0.0, (1 - progress) / 0.6))


def save(path: Path, state: dict[str, Any]) -> None:
    """Save like `torch.save`, but atomically: an interruption never leaves an incomplete file."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


class Loop:
    """Trains one stage for a given time.

    The learning rate depends on the share of the time that is used up, so that a run ends on time on any machine. A
    checkpoint holds all that is needed to resume the run.

    Args:
        stage: the stage.
        out: folder of the checkpoint and of the learning curve, `log.jsonl`.
        minutes: wall time of the stage, over all calls.
        lr: peak learning rate; has no effect if `optimizer` is given.
        rank: number of this process.
        ranks: number of processes that share a batch.
        optimizer: an optimizer whose parameter groups have a `base_lr`; None for Muon and AdamW at `lr`.
    """

    def __init__(
        self,
        stage: Stage,
        out: Path,
        minutes: float,
        lr: float,
        rank: int = 0,
        ranks: int = 1,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.stage, self.out, self.budget = stage, out, minutes * 60
        self.rank, self.ranks = rank, ranks
        self.opt = optimizer or build_optimizer(list(stage.trained.values()), lr, lr)
        self.params = [p for group in self.opt.param_groups for p in group["params"]]
        self.step, self.used = 0, 0.0

    @property
    def checkpoint(self) -> Path:
        """Path of the stage's checkpoint."""
        return self.out / f"{self.stage.name}.pt"

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            for name, module in self.stage.trained.items():
                module.load_state_dict(state["modules"][name])
            self.opt.load_state_dict(state["opt"])
            self.step, self.used = state["step"], state["used"]

    def store(self) -> None:
        """Write the checkpoint."""
        modules = {name: module.state_dict() for name, module in self.stage.trained.items()}
        save(self.checkpoint, {"modules": modules, "opt": self.opt.state_dict(), "step": self.step, "used": self.used})

    def log(self, **entry: Any) -> None:
        """Append one line to the learning curve."""
        line = json.dumps({"stage": self.stage.name, "step": self.step, "minutes": round(self.used / 60, 2), **entry})
        with (self.out / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    @property
    def done(self) -> bool:
        """Whether the budget is used up."""
        return self.used >= self.budget

    def train(
        self, log_every: int = 20, val_every: float = 5.0, save_every: float = 3.0, until: float = float("inf")
    ) -> None:
        """Train until the budget is used up.

        Args:
            log_every: number of steps between two lines of the learning curve.
            val_every: minutes between two evaluations on the validation split.
            save_every: minutes between two checkpoints.
            until: time, as returned by `time.time()`, at which to stop early and write a checkpoint.
        """
        start = time.time() - self.used
        values_of: dict[str, list[float]] = defaultdict(list)
        last_val = last_save = time.time()
        progress = self.used / self.budget
        while progress < 1:
            loss, parts = self.stage.loss(self.step, progress)
            loss.backward()
            progress = self._average((time.time() - start) / self.budget)
            parts["norm"] = float(nn.utils.clip_grad_norm_(self.params, 2.0))
            for group in self.opt.param_groups:
                group["lr"] = group["base_lr"] * schedule(progress, self.step)
            self.opt.step()
            self.opt.zero_grad(set_to_none=True)
            self.step += 1
            if self.rank:
                continue
            for key, value in {"loss": float(loss.detach()), **parts}.items():
                values_of[key].append(value)
            self.used = time.time() - start
            if self.step % log_every == 0:
                self.log(**{key: round(sum(values) / len(values), 4) for key, values in values_of.items()})
                values_of.clear()
            if time.time() - last_val > val_every * 60 or progress >= 1:
                self.log(**self.stage.validate())
                last_val = time.time()
            stop = time.time() >= until
            if time.time() - last_save > save_every * 60 or progress >= 1 or stop:
                self.store()
                last_save = time.time()
            if stop:
                break

    def _average(self, progress: float) -> float:
        """Average the gradients over all processes. Returns the progress of the first process, which all others use."""
        if self.ranks == 1:
            return progress
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.params]
        clock = torch.tensor([progress * self.ranks if self.rank == 0 else 0.0])
        flat = torch.cat([g.flatten() for g in grads] + [clock])
        dist.all_reduce(flat)
        flat /= self.ranks
        for p, g in zip(self.params, flat[:-1].split([g.numel() for g in grads]), strict=True):
            p.grad = g.view_as(p)
        return float(flat[-1])
