"""One optimizer that applies Muon to hidden matrices and AdamW to all other parameters.

`torch.optim.Muon` orthogonalises one matrix at a time. Here, matrices of the same shape are stacked and go through the
Newton-Schulz iteration together, which is several times faster for many small matrices. On a CPU this is done in
float32, because many CPUs are slow in bfloat16.

Sources: Muon (Jordan et al., 2024); the scale of its updates (Liu et al., "Muon is Scalable for LLM Training", 2025).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

import torch
from torch import Tensor, nn


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Approximate the nearest semi-orthogonal matrix of each matrix in a stack [S, A, B], by a quintic iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """An optimizer that updates parameter groups with `muon=True` by Muon, and the others by AdamW."""

    def __init__(self, groups: list[dict[str, Any]], momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "muon": False, "betas": (0.9, 0.98)})
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        del closure
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            (self._muon if group["muon"] else self._adamw)(group, params)

    def _muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        stacks: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in params:
            stacks[p.shape].append(p)
        for shape, ps in stacks.items():
            grads = []
            for p in ps:
                grad: Any = p.grad  # never None: `step` leaves out parameters without a gradient
                buf = self.state[p].setdefault("m", torch.zeros_like(p))
                buf.lerp_(grad, 1 - self.momentum)
                grads.append(torch.lerp(grad, buf, self.momentum))
            update = newton_schulz(torch.stack(grads))
            # This gives updates the root mean square of AdamW's, so that learning rates have the same scale for both.
            scale = 0.2 * max(shape) ** 0.5
            for p, u in zip(ps, update, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(u, alpha=-group["lr"] * scale)

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        b1, b2 = group["betas"]
        for p in params:
            st, grad = self.state[p], cast("Any", p.grad)
            if not st:
                st["m"], st["v"], st["t"] = torch.zeros_like(p), torch.zeros_like(p), 0
            st["t"] += 1
            st["m"].lerp_(grad, 1 - b1)
            st["v"].lerp_(grad.square(), 1 - b2)
            denom = (st["v"] / (1 - b2 ** st["t"])).sqrt_().add_(1e-8)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.addcdiv_(st["m"], denom, value=-group["lr"] / (1 - b1 ** st["t"]))


def build_optimizer(modules: list[nn.Module], lr_muon: float, lr_adam: float, weight_decay: float = 0.02) -> Muon:
    """Build the optimizer for all parameters of some modules that require a gradient.

    Hidden matrices are updated by Muon; embeddings, heads, norms, biases and convolutions by AdamW.

    Args:
        modules: the modules. A parameter that several of them share is taken once.
        lr_muon: peak learning rate of Muon.
        lr_adam: peak learning rate of AdamW.
        weight_decay: weight decay of Muon; AdamW has none.
    """
    muon: list[Tensor] = []
    adam: list[Tensor] = []
    seen: set[int] = set()
    for module in modules:
        for name, p in module.named_parameters():
            if id(p) in seen or not p.requires_grad:
                continue
            seen.add(id(p))
            hidden = p.ndim == 2 and p.shape[0] <= 1024 and not any(s in name for s in ("embed", "aux"))
            (muon if hidden else adam).append(p)
    return Muon(
        [
            {"params": muon, "lr": lr_muon, "base_lr": lr_muon, "muon": True, "weight_decay": weight_decay},
            {"params": adam, "lr": lr_adam, "base_lr": lr_adam, "muon": False, "weight_decay": 0.0},
        ]
    )
