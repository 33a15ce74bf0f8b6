"""Muon for the hidden matrices and AdamW for everything else, as one optimizer.

``torch.optim.Muon`` orthogonalises matrix by matrix; here matrices of one shape are stacked and go through
Newton-Schulz as one batched product, which is several times faster for many small matrices (in float32 on a
CPU, many of which compute bfloat16 slowly).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

import torch
from torch import Tensor, nn


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices (roughly) of a stack of matrices, by a quintic iteration."""
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
    """Muon step for parameter groups with ``muon=True``, AdamW step for the others."""

    def __init__(self, groups: list[dict[str, Any]], momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "muon": False, "betas": (0.9, 0.98)})
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all groups."""
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
                grad: Any = p.grad  # the caller leaves parameters without one out
                buf = self.state[p].setdefault("m", torch.zeros_like(p))
                buf.lerp_(grad, 1 - self.momentum)
                grads.append(torch.lerp(grad, buf, self.momentum))
            update = newton_schulz(torch.stack(grads))
            # Same root mean square as an AdamW update, so that both kinds share one scale of lr.
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
    """Hidden matrices to Muon; embeddings, heads, norms, biases and convolutions to AdamW."""
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
