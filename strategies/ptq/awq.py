"""AWQ: weight channels that see large inputs are scaled up before the weights are rounded."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qapbench import (
    Block,
    CalibratedPTQ,
    Calibration,
    CalibrationResult,
    Format,
    LinearPlan,
    MeanAbs,
    PackedWeight,
    Rows,
    Scaling,
    installed_all,
    ptq,
)

STEPS = 20  # steps of the grid of exponents and, over the full range, of the grid of clipping limits
LEAST_CLIP = 0.5  # share of a group's range that clipping may cut off, exclusive
CLIP_TOKENS = 512  # tokens on which clipping limits are compared, as in the released code
UNCLIPPED = ("q_proj", "k_proj")  # the authors found that clipping these, whose product enters a softmax, does harm


@ptq("awq")
@dataclass(frozen=True)
class AWQ(CalibratedPTQ):
    """Scale input channels by their mean magnitude, clip each group of weights, and round to nearest.

    The weight's columns are multiplied by s = mean|x|^r / sqrt(max * min), where x is the linear's input and the
    maximum and minimum are over the channels of mean|x|^r; the input is divided by s. Of 20 exponents r from 0 to 0.95
    the one with the least error of the output is taken. Linears that read the same input share s, and the error is
    that of the smallest module that contains them all. Then each group of weights is clipped at the one of 10 limits,
    1.0 to 0.55 of its largest magnitude, with the least error. Activations are rounded dynamically, as in `rtn`.

    Two things differ from the released code. It folds s into the norm or linear before; here s stays at the input, so
    linears without a suitable norm or linear before them are searched too. The released clamping of the zero point
    breaks groups whose weights all have one sign; with the default format here ranges always contain zero.

    Attributes:
        clip: whether weights are clipped, except those of query and key projections. The release clips.

    Source:
        AWQ (Lin et al., MLSys 2024).
    """

    clip: bool = True

    def calibrate(
        self,
        calibration: Calibration,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
    ) -> CalibrationResult:
        if weights is None:
            return {name: {} for name in linears}

        def find(block: Block) -> CalibrationResult:
            means = block.observe(lambda _: MeanAbs())
            rows = block.observe(lambda _: Rows(CLIP_TOKENS, len(calibration)))
            found: CalibrationResult = {}
            for group in block.groups():
                mean = means[next(iter(group.linears))].value
                scale = best_scale(block.inside(group.module), group.linears, mean, weights)
                for name, linear in group.linears.items():
                    found[name] = {"scale": scale}
                    if self.clip and not name.endswith(UNCLIPPED):
                        x = rows[name].value.to(scale).float() / scale
                        found[name]["clip"] = best_clip(linear.weight.detach().float() * scale, x, weights)
            return found

        return calibration.block_by_block(linears, find)

    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        if weights is None:
            return LinearPlan(None, activations)
        weight = Clamped(weights, found["clip"]) if "clip" in found else weights
        return LinearPlan(weight, activations, Scaling(found["scale"]))


@dataclass(frozen=True)
class Clamped:
    """Rounding of a weight whose groups are clamped first.

    Attributes:
        format: format of the weight.
        limit: [out, groups], the largest magnitude that is left of each group.
    """

    format: Format
    limit: Tensor

    def __call__(self, w: Tensor) -> Tensor:
        return self.format(clamp(w, self.limit.to(w), self.format))

    def packed(self, w: Tensor) -> PackedWeight:
        return self.format.packed(clamp(w, self.limit.to(w), self.format))


def scales(mean: Tensor) -> Iterator[Tensor]:
    """Scales to try, mean|x|^r / sqrt(max * min), each [in], for r from 0 to 0.95 in steps of 0.05.

    Args:
        mean: [in] mean absolute value of each input channel.
    """
    for step in range(STEPS):
        scale = mean.pow(step / STEPS).clamp(min=1e-4)
        yield scale / (scale.max() * scale.min()).sqrt()


def best_scale(block: Block, linears: Mapping[str, nn.Linear], mean: Tensor, format: Format) -> Tensor:
    """Find the scale [in] with which rounding the weights changes the block's output least.

    Args:
        block: the smallest module that contains the linears, with its inputs.
        linears: linears that read the same input, by name.
        mean: [in] mean absolute value of each channel of that input.
        format: format of the weights.
    """
    wanted = [output.to("cpu") for output in block.outputs()]
    best, least = torch.ones_like(mean), math.inf
    for scale in scales(mean):
        plan = LinearPlan(lambda w, s=scale: format(w.float() * s) / s)  # type: ignore[misc]
        with installed_all(linears, plan):
            error = sum(
                float((output.float() - plain.to(output).float()).square().sum())
                for output, plain in zip(block.outputs(), wanted, strict=True)
            )
        if error < least:
            best, least = scale, error
    return best


def best_clip(w: Tensor, x: Tensor, format: Format) -> Tensor:
    """Find the limit [out, groups] for each group of weights at which clipping and rounding do least harm.

    Harm is the squared error of the group's share of the output.

    Args:
        w: [out, in] weight, scaled.
        x: [T, in] inputs, scaled.
        format: format of the weights.
    """
    size = format.group_size or w.shape[1]
    chosen = []
    for part, inputs in zip(w.split(size, dim=1), x.split(size, dim=1), strict=True):
        gram = inputs.mT @ inputs
        top = part.abs().amax(dim=1)
        best, least = top, torch.full_like(top, math.inf)
        for step in range(int(STEPS * LEAST_CLIP)):
            limit = top * (1 - step / STEPS)
            off = format(part.clamp(-limit.unsqueeze(1), limit.unsqueeze(1))) - part
            error = ((off @ gram) * off).sum(dim=1)
            best, least = torch.where(error < least, limit, best), torch.minimum(error, least)
        chosen.append(best)
    return torch.stack(chosen, dim=1)


def clamp(w: Tensor, limit: Tensor, format: Format) -> Tensor:
    """Clamp each group of w [out, in] to +-limit, which is [out, groups]. `format` gives the group size."""
    wide = limit.repeat_interleave(format.group_size or w.shape[1], dim=1)[:, : w.shape[1]]
    return torch.clamp(w, -wide, wide)
