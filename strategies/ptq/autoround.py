"""AutoRound: rounding and ranges of weights are learned by signed gradient descent (SignRound)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from qapbench import (
    AbsMaxObserver,
    Block,
    CalibratedPTQ,
    Calibration,
    CalibrationResult,
    Format,
    Grid,
    LinearPlan,
    UserError,
    grouped,
    installed_all,
    kept_rounding,
    packed_tensors,
    ptq,
    round_through,
)

from .full_precision import FullPrecision

SMALLEST = 1e-8  # smallest magnitude of a scale


@ptq("autoround")
@dataclass(frozen=True)
class AutoRound(CalibratedPTQ):
    """Learn what is added to each weight before it is rounded, and the ends of each group's range.

    The rounded weight is s clamp(round(w / s + v)), with the range [min * low, max * high] of a group of weights. v
    starts at 0, the factors low and high, which stay in [0, 1], at 1. Each step takes the gradient of the squared error
    of a decoder layer's output on a few samples, and moves every parameter by the learning rate against the gradient's
    sign. The rate falls linearly from 1 / iters to 0. The parameters of the step with the least error are kept. Layers
    are tuned in order, on the outputs of the quantized layers before them, towards the outputs that the model has in
    full precision. Activations are rounded dynamically, as in `rtn`, also while the weights are tuned.

    Symmetric levels are those of the release: the end of the range with the larger magnitude becomes -2^(b-1) scales,
    so the scale has a sign. Two things differ from the released code. Scales stay float32; the release rounds them to
    float16. The error of a sample counts by its number of tokens, because samples differ in length here.

    Attributes:
        iters: number of steps. The release has 200.
        batch: samples per step. The release has 8.
        seed: decides which samples each step takes.

    Source:
        SignRound (Cheng et al., EMNLP Findings 2024), eq. 3 and 4; auto-round 0.16.1.
    """

    iters: Annotated[int, Field(ge=0)] = 200
    batch: Annotated[int, Field(ge=1)] = 8
    seed: Annotated[int, Field(ge=0)] = 0

    weight_formats = ("int",)

    def check(self, weights: Format | None, activations: Format | None) -> None:
        super().check(weights, activations)
        if weights is not None and (weights.divisor, weights.zero_point) != ("qmax", "in_range"):
            raise UserError("weights: autoround has levels of its own; leave `divisor` and `zero_point` out")

    def calibrate(
        self,
        calibration: Calibration,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
    ) -> CalibrationResult:
        if weights is None:
            return {name: {} for name in linears}
        plain = FullPrecision()

        def find(block: Block) -> CalibrationResult:
            exact = plain.outputs(block)
            called = block.observe(lambda _: AbsMaxObserver())
            return self.tuned(block, {name: linears[name] for name in called}, exact, weights, activations)

        return calibration.block_by_block(linears, find, lambda found: self.plan(found, weights, activations))

    def tuned(
        self,
        block: Block,
        linears: Mapping[str, nn.Linear],
        wanted: list[Tensor],
        weights: Format,
        activations: Format | None,
    ) -> CalibrationResult:
        """The rounded "weight" [out, in] of some linears of a block, given its outputs in full precision."""
        draw = torch.Generator().manual_seed(self.seed)
        count = min(self.batch, len(block.passes))
        batches = (torch.randperm(len(block.passes), generator=draw)[:count].tolist() for _ in range(self.iters))

        def error(new: Mapping[str, Tensor], batch: list[int]) -> Tensor:
            losses = []
            for index in batch:
                one = block.passes[index]
                output = block.forward(one, new).float()
                off = (output - wanted[index].to(output)).square()
                losses.append((off if one.tokens is None else off[one.tokens.valid.to(off.device)]).sum())
            return torch.stack(losses).sum()

        original = {name: linear.weight.detach() for name, linear in linears.items()}
        with installed_all(linears, LinearPlan(None, activations), lambda: block.current[0]):
            found = learn(original, weights, error, batches, self.iters)
        kept: CalibrationResult = {}
        for name, w in original.items():
            v, low, high = found[name]
            values = rounded(w.float(), weights, v, low, high)
            kept[name] = packed_tensors(values, grids(w, weights, low, high), weights)
        return kept

    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        return LinearPlan(kept_rounding(found) if weights else None, activations)


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


def rounded(w: Tensor, format: Format, v: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Round a weight [out, in], differentiably.

    Args:
        w: the weight.
        format: its format.
        v: [out, in], added in units of the scale before rounding.
        low: [out, groups], factors of the lower ends of the ranges.
        high: [out, groups], factors of the upper ends.
    """
    parts, top = [], 2.0**format.bits
    cut = zip(scales(w, format, low, high), grouped(v, format.group_size), strict=True)
    for (part, scale, zero), shift in cut:
        if zero is None:
            levels = round_through(part / scale + shift).clamp(-top / 2, top / 2 - 1)
        else:
            levels = (round_through(part / scale + shift) + zero).clamp(0, top - 1) - zero
        parts.append((scale * levels).flatten(1))
    return torch.cat(parts, dim=1).to(w.dtype)


def scales(w: Tensor, format: Format, low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Each part [out, groups, columns] that `grouped` cuts a weight into, its scales, and its zero points.

    Symmetric levels have no zero points, and a scale with a sign. The arguments are those of `rounded`.
    """
    start, top = 0, 2.0**format.bits
    for part in grouped(w.float(), format.group_size):
        groups = slice(start, start + part.shape[1])
        start += part.shape[1]
        least = part.amin(dim=-1, keepdim=True).clamp(max=0) * low[:, groups].unsqueeze(-1)
        most = part.amax(dim=-1, keepdim=True).clamp(min=0) * high[:, groups].unsqueeze(-1)
        if format.symmetric:
            scale = torch.where(most < -least, -least, -most) / (top / 2)
            yield part, torch.where(scale < 0, scale.clamp(max=-SMALLEST), scale.clamp(min=SMALLEST)), None
        else:
            scale = ((most - least) / (top - 1)).clamp(min=SMALLEST)
            yield part, scale, round_through(-least / scale)


def grids(w: Tensor, format: Format, low: Tensor, high: Tensor) -> list[Grid]:
    """The levels that `rounded` rounds to, with positive scales: a negative one turns the order of the levels round."""
    top, found = 2**format.bits, []
    for _, scale, zero in scales(w, format, low, high):
        turned = torch.where(scale < 0, top // 2 - 1, top // 2).float() if zero is None else zero
        found.append(Grid(scale.abs(), turned, 0, top - 1))
    return found
