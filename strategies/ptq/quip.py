"""QuIP: weights are made incoherent by rotations and then rounded with linear feedback (LDLQ)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from qapbench import (
    Block,
    CalibratedPTQ,
    Calibration,
    CalibrationResult,
    FloatGrid,
    Format,
    Fraction,
    Gram,
    Grid,
    LinearPlan,
    RotatedBoth,
    Rotation,
    kept_rounding,
    packed_tensors,
    ptq,
    rotation_flops,
)

COLUMNS = 128  # columns that are rounded before their feedback is added to all later ones at once


@ptq("quip")
@dataclass(frozen=True)
class QuIP(CalibratedPTQ):
    """Rotate weights on both sides, then round them column by column with feedback of the errors so far.

    With random orthogonal U and V, the weight becomes U W V^T and the inputs' second moment H = X X^T becomes V H V^T.
    Column k is then rounded to Q(W_k + (W - Q)_<k a_k), where a_k is column k of the strictly upper triangular A in
    H = (A + I) D (A + I)^T (eq. 2 and 4). The method is for weights only. If activations are quantized too, they are
    rounded as the product sees them, which is rotated.

    Three things differ from the paper. Levels are those of the format, for each rotated row or group; the paper has one
    range for the whole matrix, from its Frobenius norm. The paper's rescaling of the diagonal of H and its greedy
    second passes are left out. U and V are Hadamard transforms with random signs, as in QuIP#; the paper takes
    Kronecker products of two orthogonal matrices.

    Attributes:
        damping: what is added to the diagonal of H, as a fraction of its mean diagonal. The release has 0.01.
        seed: seed of the random rotations. Each linear in scope has its own two.

    Source:
        QuIP (Chee et al., NeurIPS 2023), eq. 2 and 4.
    """

    damping: Fraction = 0.01
    seed: Annotated[int, Field(ge=0)] = 0

    def calibrate(
        self,
        calibration: Calibration,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
    ) -> CalibrationResult:
        places = {name: index for index, name in enumerate(linears)}

        def find(block: Block) -> CalibrationResult:
            found: CalibrationResult = {}
            for name, gram in block.observe(lambda _: Gram()).items():
                linear, seed = linears[name], self.seed + 2 * places[name]
                ins, outs = Rotation.random(linear.in_features, seed), Rotation.random(linear.out_features, seed + 1)
                found[name] = {"in": ins.signs, "in_mixer": ins.mixer, "out": outs.signs, "out_mixer": outs.mixer}
                if linear.bias is not None:
                    found[name]["bias"] = linear.bias.detach()
                if weights is not None:
                    turned = RotatedBoth(ins, outs).weight(linear.weight.detach())
                    done, grids = ldlq_on_levels(turned, ins(ins(gram.value).mT), weights, self.damping)
                    found[name] |= packed_tensors(done, grids, weights)
            return found

        return calibration.block_by_block(linears, find, lambda found: self.plan(found, weights, None))

    def online_flops(self, name: str, inward: int, outward: int, of_norm: bool) -> int:
        """Both rotations of every linear: each has its own."""
        return rotation_flops(inward) + rotation_flops(outward)

    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        rotations = Rotation(found["in"], found["in_mixer"]), Rotation(found["out"], found["out_mixer"])
        transform = RotatedBoth(*rotations, found.get("bias"))
        return LinearPlan(kept_rounding(found) if weights else None, activations, transform)


def ldlq(w: Tensor, gram: Tensor, format: Format, damping: float) -> Tensor:
    """Round a weight column by column with linear feedback (LDLQ).

    Args:
        w: [out, in] weight, rotated.
        gram: [in, in], the second moment H of the rotated inputs.
        format: format of the weight.
        damping: what is added to the diagonal of `gram`, as a fraction of its mean diagonal.

    Returns:
        The rounded weight [out, in].
    """
    return ldlq_on_levels(w, gram, format, damping)[0]


def ldlq_on_levels(w: Tensor, gram: Tensor, format: Format, damping: float) -> tuple[Tensor, list[Grid | FloatGrid]]:
    """The rounded weight [out, in], and the levels of each group; see `ldlq`."""
    width, size = w.shape[1], format.group_size or w.shape[1]
    feedback = upper_unit(gram, damping)
    levels = format.levels_within(w)
    grids = [levels.of(part) for part in w.split(size, dim=1)]
    done, target = torch.zeros_like(w), w.clone()
    for start in range(0, width, COLUMNS):
        stop = min(start + COLUMNS, width)
        for k in range(start, stop):
            errors = w[:, start:k] - done[:, start:k]
            column = target[:, k : k + 1] + errors @ feedback[start:k, k : k + 1]
            done[:, k : k + 1] = grids[k // size](column)
        target[:, stop:] += (w[:, start:stop] - done[:, start:stop]) @ feedback[start:stop, stop:]
    return done, grids


def upper_unit(gram: Tensor, damping: float) -> Tensor:
    """Factorise H = (A + I) D (A + I)^T and return A + I [in, in], upper triangular with ones on its diagonal.

    Args:
        gram: [in, in], H without the damping.
        damping: what is added to the diagonal of `gram`, as a fraction of its mean diagonal.
    """
    # With rows and columns reversed, the lower factor is the upper one.
    damped = gram.flip(0, 1).double()
    damped.diagonal().add_(damping * gram.diagonal().double().mean().clamp(min=1e-12))
    upper = torch.linalg.cholesky(damped).flip(0, 1)
    del damped  # a matrix of a wide linear takes a GB in float64
    return upper.div_(upper.diagonal().clone()).to(gram.dtype)
