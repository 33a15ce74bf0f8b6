"""MBQ (Li et al., CVPR 2025): AWQ's search for scales, the error of visual tokens weighed by their gradients."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qapbench import (
    Block,
    CalibratedPTQ,
    Calibration,
    CalibrationResult,
    Format,
    Gradient,
    Group,
    LinearPlan,
    MeanAbs,
    Scaling,
    installed_all,
    ptq,
)

from .awq import scales


@ptq("mbq")
@dataclass(frozen=True)
class MBQ(CalibratedPTQ):
    """s = mean|x|^r / sqrt(max * min), r of 20 steps, by sum over text |error| + ratio * sum over vision |error|.

    The ratio (eq. 7) is mean |gradient| at visual tokens over that at the caption's, where a sublayer ends (output
    and down projection), and at least the median over the layers. Gradients are those of the samples' `labels`.
    Errors are those of the smallest module that holds the linears, weights and activations rounded as in the run.
    The published formats are symmetric rows for W and A, and for weights alone asymmetric groups of 128 with
    `zero_point: clamped`. Where a block has no gradient (a vision tower, samples without an image) the ratio is 1.
    """

    def calibrate(
        self,
        calibration: Calibration,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
    ) -> CalibrationResult:
        gradients = calibration.gradients(linears) if calibration.family is not None else {}
        ratios = {name: ratio_of(gradient) for name, gradient in gradients.items()}

        def find(block: Block) -> CalibrationResult:
            means = block.observe(lambda _: MeanAbs())
            found: CalibrationResult = {}
            groups = block.groups()
            for group, end in zip(groups, ends(groups), strict=True):
                alike = [r for name, r in ratios.items() if kind(name) == kind(end) and not math.isnan(r)]
                own = ratios.get(end, math.nan)
                ratio = 1.0 if math.isnan(own) else max(own, statistics.median(alike))
                mean = means[next(iter(group.linears))].value
                scale = search(block.inside(group.module), group.linears, mean, ratio, weights, activations)
                found |= {name: {"scale": scale} for name in group.linears}
            return found

        return calibration.block_by_block(linears, find)

    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        return LinearPlan(weights, activations, Scaling(found["scale"]))


def ratio_of(gradient: Gradient) -> float:
    """Vision over caption; NaN where either is missing."""
    return gradient.vision / gradient.answer if gradient.answer > 0 else math.nan


def ends(groups: list[Group]) -> list[str]:
    """For each group the linear with which its sublayer ends: the last one of the module that holds both."""
    last = [list(group.linears)[-1] for group in groups]
    for place in range(len(last) - 2, -1, -1):
        if parent(last[place]) == parent(last[place + 1]):
            last[place] = last[place + 1]
    return last


def parent(name: str) -> str:
    return name.rpartition(".")[0]


def kind(name: str) -> str:
    """What a linear's name says without its layer's number: the same in every layer."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def search(
    block: Block,
    linears: Mapping[str, nn.Linear],
    mean: Tensor,
    ratio: float,
    weights: Format | None,
    activations: Format | None,
) -> Tensor:
    """[in]: of the grid, the scale with which the quantized linears change the module's output least."""
    wanted = [output.to("cpu") for output in block.outputs()]
    best, least = torch.ones_like(mean), math.inf
    for scale in scales(mean):
        plan = LinearPlan(weights, activations, Scaling(scale))
        with installed_all(linears, plan, lambda: block.current[0]):
            error = sum(
                weighed(output.float() - plain.to(output).float(), *one.masks(output), ratio)
                for one, output, plain in zip(block.passes, block.outputs(), wanted, strict=True)
            )
        if error < least:
            best, least = scale, error
    return best


def weighed(error: Tensor, vision: Tensor, valid: Tensor, ratio: float) -> float:
    """Sum of |error| [..., D] over valid tokens, those of images times `ratio`."""
    size = error.abs().sum(dim=-1).flatten()
    return float((size * valid * torch.where(vision, ratio, 1.0)).sum())
