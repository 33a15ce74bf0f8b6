"""QuIP (Chee et al., NeurIPS 2023): weights made incoherent by rotations, then rounded with linear feedback (LDLQ)."""

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
    Format,
    Fraction,
    Gram,
    Grid,
    LinearPlan,
    Rotation,
    Transform,
    ptq,
)

COLUMNS = 128  # rounded before their feedback is added to all behind


@ptq("quip")
@dataclass(frozen=True)
class QuIP(CalibratedPTQ):
    """W -> U W V^T and H -> V H V^T with random orthogonal U, V; columns rounded in turn, each fed the errors so far.

    Column k becomes Q(W_k + (W - Q)_<k a_k) with H = (A + I) D (A + I)^T, A strictly upper triangular (eq. 2, 4).
    The method is weight-only; activations asked for are rounded as the product sees them, rotated. Levels are the
    format's, of each rotated row or group (the paper: one range of the matrix from its Frobenius norm); the paper's
    rescaling of the diagonal of H and its greedy second passes are left out. U and V are Hadamard transforms with
    random signs (the paper: Kronecker products of two orthogonal matrices; the Hadamard transform is QuIP#'s).
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
                    turned = Incoherent(ins, outs).weight(linear.weight.detach())
                    found[name]["weight"] = ldlq(turned, ins(ins(gram.value).mT), weights, self.damping)
            return found

        return calibration.block_by_block(linears, find, lambda found: self.plan(found, weights, None))

    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        rotations = Rotation(found["in"], found["in_mixer"]), Rotation(found["out"], found["out_mixer"])
        transform = Incoherent(*rotations, found.get("bias"))
        return LinearPlan(found["weight"].to if weights else None, activations, transform)


class Incoherent(Transform):
    """Input and output of a linear in other bases: y = U^T (U W V^T) (V x) + bias."""

    def __init__(self, ins: Rotation, outs: Rotation, bias: Tensor | None = None) -> None:
        self.ins, self.outs, self.bias = ins, outs, bias

    def input(self, x: Tensor) -> Tensor:
        return self.ins(x)

    def weight(self, w: Tensor) -> Tensor:
        return self.outs(self.ins(w).mT).mT.contiguous()

    def output(self, y: Tensor) -> Tensor:
        """The linear has added its bias already, which belongs behind U^T."""
        bias = 0 if self.bias is None else self.bias.to(y.device).float()
        return self.outs.inverse(y.float() - bias) + bias


def ldlq(w: Tensor, gram: Tensor, format: Format, damping: float) -> Tensor:
    """w [out, in] on the format's levels, rounded column by column with the feedback that is best for `gram`."""
    width, size = w.shape[1], format.group_size or w.shape[1]
    feedback = upper_unit(gram, damping)
    grids = [Grid.of(part, format) for part in w.split(size, dim=1)]
    done, target = torch.zeros_like(w), w.clone()
    for start in range(0, width, COLUMNS):
        stop = min(start + COLUMNS, width)
        for k in range(start, stop):
            errors = w[:, start:k] - done[:, start:k]
            column = target[:, k : k + 1] + errors @ feedback[start:k, k : k + 1]
            done[:, k : k + 1] = grids[k // size](column)
        target[:, stop:] += (w[:, start:stop] - done[:, start:stop]) @ feedback[start:stop, stop:]
    return done


def upper_unit(gram: Tensor, damping: float) -> Tensor:
    """A + I of gram + damping * mean diagonal = (A + I) D (A + I)^T: upper triangular, ones on its diagonal."""
    identity = torch.eye(len(gram), device=gram.device, dtype=torch.float64)
    damped = gram.double() + damping * gram.double().diagonal().mean().clamp(min=1e-12) * identity
    upper = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)  # the lower factor of the reversed matrix
    return (upper / upper.diagonal()).to(gram.dtype)
