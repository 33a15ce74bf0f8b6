"""MBQ: AWQ's search for scales, with the errors of visual tokens weighted by their gradients."""

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
    """Scale input channels as AWQ does, with the errors of visual tokens weighted by their gradients.

    The scales tried are AWQ's, s = mean|x|^r / sqrt(max * min) for 20 exponents r. The one with the least sum of
    |error| over the tokens of the answer plus ratio times the sum of |error| over visual tokens is taken. Tokens of the
    question and the system prompt do not count, as in the released code. (Outside the language model, and for samples
    without labels, all tokens that are not visual do.) The error is that of the
    smallest module that contains the linears which read the same input, with weights and activations rounded as in the
    run.

    The ratio (eq. 7) is the mean |gradient| at visual tokens over the mean |gradient| at the tokens of the answer (in
    the paper, of the caption). It is measured where a sublayer ends (output and down projection), and is at least its
    median over the layers. Gradients are those of the loss on the samples' `labels`. If a block has no gradients, as in
    a vision tower or for samples without an image, the ratio is 1.

    The published formats are symmetric rows for weights and activations, and, for weights alone, asymmetric groups of
    128 with `zero_point: clamped`. Weights are not clipped.

    Source:
        MBQ (Li et al., CVPR 2025), eq. 7 for the ratio. What counts as text is that of the released code (thu-nics/MBQ
        at a4d460d, March 2025).
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
    """Compute the mean |gradient| at visual tokens over that at the answer's tokens; NaN if either is missing."""
    return gradient.vision / gradient.answer if gradient.answer > 0 else math.nan


def ends(groups: list[Group]) -> list[str]:
    """Find, for each group of a block, the linear with which its sublayer ends.

    A sublayer consists of the consecutive groups whose last linears belong to the same module.

    Args:
        groups: groups in the order of a forward pass.

    Returns:
        One name per group.
    """
    last = [list(group.linears)[-1] for group in groups]
    for place in range(len(last) - 2, -1, -1):
        if parent(last[place]) == parent(last[place + 1]):
            last[place] = last[place + 1]
    return last


def parent(name: str) -> str:
    """Name of the module that contains the module `name`."""
    return name.rpartition(".")[0]


def kind(name: str) -> str:
    """A linear's name without numbers, which is the same in every layer."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def search(
    block: Block,
    linears: Mapping[str, nn.Linear],
    mean: Tensor,
    ratio: float,
    weights: Format | None,
    activations: Format | None,
) -> Tensor:
    """Find the scale [in] with which quantizing the linears changes the block's output least.

    Args:
        block: the smallest module that contains the linears, with its inputs.
        linears: linears that read the same input, by name.
        mean: [in] mean absolute value of each channel of that input.
        ratio: weight of the errors of visual tokens, relative to tokens of the answer.
        weights: format of the weights; None leaves them as they are.
        activations: format of the activations; None leaves them as they are.
    """
    wanted = [output.to("cpu") for output in block.outputs()]
    best, least = torch.ones_like(mean), math.inf
    for scale in scales(mean):
        plan = LinearPlan(weights, activations, Scaling(scale))
        with installed_all(linears, plan, lambda: block.current[0]):
            error = sum(
                weighed(output.float() - plain.to(output).float(), one.masks(output)[0], one.answer(output), ratio)
                for one, output, plain in zip(block.passes, block.outputs(), wanted, strict=True)
            )
        if error < least:
            best, least = scale, error
    return best


def weighed(error: Tensor, vision: Tensor, answer: Tensor, ratio: float) -> float:
    """Sum the absolute errors over the tokens of the answer, and over visual tokens times `ratio`.

    Args:
        error: [..., D].
        vision: True for visual tokens, one value for each row of `error`.
        answer: True for tokens of the answer, in the same shape.
        ratio: weight of visual tokens.
    """
    size = error.abs().sum(dim=-1).flatten()
    return float((size * (ratio * vision + answer.to(size))).sum())
