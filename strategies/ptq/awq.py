"""AWQ (Lin et al., MLSys 2024): channels that see large inputs are scaled up before weights are rounded."""

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
    Rows,
    Scaling,
    installed_all,
    ptq,
)

STEPS = 20  # of both grids
LEAST_CLIP = 0.5
CLIP_TOKENS = 512
UNCLIPPED = ("q_proj", "k_proj")  # clipping what the softmax exponentiates does harm, the authors found


@ptq("awq")
@dataclass(frozen=True)
class AWQ(CalibratedPTQ):
    """s = mean|x|^r / sqrt(max * min), r of 20 by the output's error; then weights clipped by group, of 10 by error.

    Linears that read one input share s, and the error is that of the smallest module that holds them all. Every
    such group is searched, also those whose scale no norm or linear in front could take up, because it stays at the
    input. Ranges always reach zero (the released code breaks where a group has one sign). Activations as `rtn`.
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
        limit = found.get("clip")

        def weight(w: Tensor) -> Tensor:
            return weights(w if limit is None else clamp(w, limit.to(w), weights))

        return LinearPlan(weight, activations, Scaling(found["scale"]))


def scales(mean: Tensor) -> Iterator[Tensor]:
    """The grid: mean|x|^r / sqrt(max * min) [in], r from 0 in steps of 1 / 20."""
    for step in range(STEPS):
        scale = mean.pow(step / STEPS).clamp(min=1e-4)
        yield scale / (scale.max() * scale.min()).sqrt()


def best_scale(block: Block, linears: Mapping[str, nn.Linear], mean: Tensor, format: Format) -> Tensor:
    """[in]: of the grid, the scale whose rounded weights change the block's output least."""
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
    """[out, groups]: of each group of w [out, in] the limit at which rounding changes its share of the output least."""
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
    """w [out, in] held within +-limit [out, groups]."""
    wide = limit.repeat_interleave(format.group_size or w.shape[1], dim=1)[:, : w.shape[1]]
    return torch.clamp(w, -wide, wide)
