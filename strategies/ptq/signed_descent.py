"""AutoRound's steps: signed gradient descent on what is added before rounding, and on the ends of ranges."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from qapbench import Format, grouped

from .signed_levels import rounded


def tune(
    original: Mapping[str, Tensor],
    format: Format,
    error: Callable[[Mapping[str, Tensor], list[int]], Tensor],
    batches: Iterable[list[int]],
    iters: int,
) -> dict[str, Tensor]:
    """Find the rounded weights [out, in] with the least error that signed gradient descent comes across.

    Args:
        original: weights by name.
        format: their format.
        error: the error of rounded weights on some samples.
        batches: the samples of each step.
        iters: number of steps.
    """
    found = learn(original, format, error, batches, iters)
    return {name: rounded(w, format, *found[name]) for name, w in original.items()}


def learn(
    original: Mapping[str, Tensor],
    format: Format,
    error: Callable[[Mapping[str, Tensor], list[int]], Tensor],
    batches: Iterable[list[int]],
    iters: int,
) -> dict[str, list[Tensor]]:
    """The parameters "v", "low" and "high" of `rounded` that give the weights which `tune` finds."""
    learned: dict[str, list[Tensor]] = {}
    for name, w in original.items():
        groups = sum(part.shape[1] for part in grouped(w, format.group_size))
        ends = torch.ones(2, len(w), groups, dtype=torch.float32, device=w.device)
        learned[name] = [torch.zeros_like(w, dtype=torch.float32), *ends]
    parameters = [parameter.requires_grad_(True) for some in learned.values() for parameter in some]
    best, least = copied(learned), torch.inf
    for step, batch in enumerate(batches):
        with torch.enable_grad():
            new = {name: rounded(w, format, *learned[name]) for name, w in original.items()}
            loss = error(new, batch)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        if (value := float(loss.detach())) < least:
            best, least = copied(learned), value
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter -= (1 - step / iters) / iters * gradient.sign()
            for _, low, high in learned.values():
                low.clamp_(0, 1)
                high.clamp_(0, 1)
    return best


def copied(learned: Mapping[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    """The parameters as they are now."""
    return {name: [parameter.detach().clone() for parameter in some] for name, some in learned.items()}
