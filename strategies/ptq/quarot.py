"""QuaRot: Hadamard rotations of the residual stream and of what enters output and down projections."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from qapbench import (
    Block,
    CalibratedPTQ,
    Calibration,
    CalibrationResult,
    Format,
    Fraction,
    Gram,
    LinearPlan,
    Rotation,
    kept_rounding,
    ptq,
    rotated_by,
    rotation_flops,
)

from .mquant import MQuant
from .places import Place, places

Rotations = tuple[Rotation, Rotation | None]
"""Rotation of a linear's input, and of its output; None if the output is not rotated."""


@ptq("quarot")
@dataclass(frozen=True)
class QuaRot(CalibratedPTQ):
    """Rotate inputs and outputs of the linears as QuaRot's model does, clip the ranges of weights, and round them.

    The residual stream is rotated by Q, a Hadamard transform with random signs, the same in every layer. Linears that
    read an RMSNorm take its gain g over: x / g is rotated, and W diag(g) with it. Other linears (output and down
    projection) read a Hadamard transform of their input and write the rotated stream, so their rows are rotated too.
    Values are transformed head by head. Weights are rounded by `gptq` or to nearest, in the share of their range with
    the least sum of |error|^2.4. Activations are rounded dynamically, as in `rtn`, where they are rotated.

    Here each linear undoes its own rotation, so the model itself stays as it is. In exact arithmetic that is the
    released model, except for two things: the release centres the embeddings, which changes a model with RMSNorms; and
    widths that are no power of two have a random orthogonal factor in place of a tabulated Hadamard matrix. Keys are
    not rotated: the KV cache is the spec's `kv`. Sensitivity metrics see the features before rotation.

    Attributes:
        rounding: "gptq", or "rtn" for rounding to nearest. The release has both.
        damping: of GPTQ, see `gptq`.
        seed: seed of the signs.

    Source:
        QuaRot (Ashkboos et al., NeurIPS 2024); spcl/QuaRot at 5008669, fake_quant.
    """

    rounding: Literal["gptq", "rtn"] = "gptq"
    damping: Fraction = 0.01
    seed: Annotated[int, Field(ge=0)] = 0

    formats = (Format(bits=4, symmetric=True), Format(bits=4, symmetric=True))

    def calibrate(
        self,
        calibration: Calibration,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
    ) -> CalibrationResult:
        return self.rotated(calibration, linears, weights, self.rotations)

    def rotated(
        self,
        calibration: Calibration,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        rotations: Callable[[Place], Rotations],
    ) -> CalibrationResult:
        """Rotate linears as `rotations` says, and round their weights, block by block."""
        rounder = MQuant(rounding=self.rounding, damping=self.damping)

        def find(block: Block) -> CalibrationResult:
            found: CalibrationResult = {}
            grams = block.observe(lambda _: Gram())
            for name, place in places(calibration.model, block).items():
                found[name] = described(place, *rotations(place))
                if weights is not None:
                    turned = rotated_by(found[name])
                    gram = turned.input(turned.input(grams[name].value).mT) if self.rounding == "gptq" else None
                    found[name] |= rounder.rounded(turned.weight(place.linear.weight.detach()), gram, weights)
            return found

        return calibration.block_by_block(linears, find, lambda found: self.plan(found, weights, None))

    def rotations(self, place: Place) -> Rotations:
        """What rotates a linear's input, and its output, or each head of it."""
        linear = place.linear
        ins = Rotation.hadamard(linear.in_features, self.seed, signs=place.stream)
        if not place.stream:
            return ins, Rotation.hadamard(linear.out_features, self.seed, signs=True)
        if place.values == "writes" and place.head:
            return ins, Rotation.hadamard(place.head, self.seed, signs=False)
        return ins, None

    def online_flops(self, name: str, inward: int, outward: int, of_norm: bool) -> int:
        """Rotations of what enters output and down projections. All others can be folded into weights."""
        return 0 if of_norm else rotation_flops(inward)

    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        return LinearPlan(kept_rounding(found) if weights else None, activations, rotated_by(found))


def described(place: Place, ins: Rotation, outs: Rotation | None) -> dict[str, Tensor]:
    """The tensors that `rotated_by` makes the transform of a linear from."""
    found = {"signs": ins.signs, "mixer": ins.mixer}
    if place.gain is not None:
        found["gain"] = place.gain
    if outs is not None:
        found |= {"out_signs": outs.signs, "out_mixer": outs.mixer}
        if place.linear.bias is not None:
            found["bias"] = place.linear.bias.detach()
    return found
