"""SpinQuant: the rotations of the residual stream and of the heads' values are learned."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from qapbench import (
    AbsMaxObserver,
    AnswerLoss,
    Block,
    Calibration,
    CalibrationResult,
    Format,
    Rotation,
    descend,
    ptq,
    rotated_by,
)

from .places import Place, places, restored, stored
from .quarot import QuaRot, Rotations, described

Points = Mapping[tuple[str, int], Tensor]
"""R1 by the `stream_key` of places, R2 by their `head_key`."""


@ptq("spinquant")
@dataclass(frozen=True)
class SpinQuant(QuaRot):
    """QuaRot's model with learned rotations: R1 of the residual stream, and R2 of the heads' values in each layer.

    R1 and R2 start as Hadamard transforms with random signs. Each step moves them along the gradient of the loss on the
    answers of a few samples, by Cayley SGD, which keeps them orthogonal; the rate falls from `lr` to 0 as a cosine. The
    inputs of the linears are rounded meanwhile, and so are the weights if they will be rounded to nearest; with
    "gptq", or without a format of weights, they are not, as the release advises. The gradient passes through rounding
    and clamping as if nothing had been done, and no gradient reaches a scale. Then everything is as in `quarot`, with
    two differences: the output projection reads R2 of each head, where QuaRot has a Hadamard transform of its whole
    input, and the down projection keeps its fixed Hadamard transform (R4).

    What differs from the released code, besides what `quarot` says: the loss is that of the samples' answers, the
    release's that of running text. R1 and R2 are made orthogonal once, at the end, in place of a QR decomposition at
    every hundredth step by chance. The output projection's input has the format that the spec asks for, in the release
    always groups of a head. R3, which rotates queries and keys, matters to a quantized KV cache alone and is left out.
    Linears outside the decoder have the rotations of `quarot`.

    Attributes:
        rounding: "gptq", or "rtn" for rounding to nearest.
        damping: of GPTQ, see `gptq`.
        seed: seed of the signs and of the order of samples.
        steps: number of steps. The release has 100.
        lr: learning rate. The release has 1.5.
        batch: samples per step. The release has 8, one on each GPU.

    Source:
        SpinQuant (Liu et al., ICLR 2025), sections 3.1 and 3.2; facebookresearch/SpinQuant at 8f47aa3, of which facts
        were taken and no code.
    """

    steps: Annotated[int, Field(ge=0)] = 100
    lr: Annotated[float, Field(gt=0)] = 1.5
    batch: Annotated[int, Field(ge=1)] = 8

    formats = (Format(bits=4, symmetric=True), Format(bits=4))

    def calibrate(
        self,
        calibration: Calibration,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
    ) -> CalibrationResult:
        def look(block: Block) -> CalibrationResult:
            block.observe(lambda _: AbsMaxObserver())  # refuses what is not finite
            return {name: stored(one) for name, one in places(calibration.model, block).items() if one.decoder}

        seen = calibration.block_by_block(linears, look, whole=True)
        standing = {name: restored(linears[name], found) for name, found in seen.items()}
        points = {
            key: Rotation.hadamard(key[1], self.seed, signs=True).matrix.mT
            for place in standing.values()
            for key in (place.stream_key, place.head_key)
            if key[1]
        }
        if self.steps and points:
            rounded = weights if self.rounding == "rtn" or activations is None else None
            points = descend(points, self.losses(calibration, standing, rounded, activations), self.steps, self.lr)
        return self.rotated(calibration, linears, weights, lambda place: self.learned(place, points))

    def online_flops(self, name: str, inward: int, outward: int, of_norm: bool) -> int:
        """Rotations of what enters down projections. R2 of the output projection is folded into the values' weights."""
        return 0 if name.endswith(".o_proj") else super().online_flops(name, inward, outward, of_norm)

    def losses(
        self,
        calibration: Calibration,
        standing: Mapping[str, Place],
        weights: Format | None,
        activations: Format | None,
    ) -> Callable[[Points, int], Iterator[Tensor]]:
        """The losses of a step's samples, with linears in these places rounded to these formats between R1 and R2."""
        loss = AnswerLoss(calibration, {name: place.linear for name, place in standing.items()})
        draw = torch.Generator().manual_seed(self.seed)
        batches = [torch.randperm(len(loss), generator=draw)[: self.batch].tolist() for _ in range(self.steps)]

        def of(points: Points, step: int) -> Iterator[Tensor]:
            for index in batches[step]:
                held, read = {}, {}
                for name, place in standing.items():
                    turned = rotated_by(described(place, *self.learned(place, points)))
                    if weights is not None:
                        held[name] = turned.rounded_weight(weights, place.linear.weight.detach())
                    if activations is not None:
                        read[name] = functools.partial(turned.rounded_input, activations)
                yield loss(index, held, read)

        return of

    def learned(self, place: Place, points: Points) -> Rotations:
        """The rotations of `quarot` with R1 and R2 in their places; they multiply rows from the right."""
        ins, outs = self.rotations(place)
        if not place.decoder:
            return ins, outs
        stream = Rotation.dense(points[place.stream_key].mT)
        ins, outs = (stream, outs) if place.stream else (ins, stream)
        if place.values is None:
            return ins, outs
        head = Rotation.dense(points[place.head_key].mT)
        return (ins, head) if place.values == "writes" else (head, outs)
