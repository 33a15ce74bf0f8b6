"""GPTQ (Frantar et al., ICLR 2023): weights rounded column by column, each error made up for by the columns behind."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from qapbench import Block, CalibratedPTQ, Calibration, CalibrationResult, Format, Fraction, Gram, Grid, LinearPlan, ptq


@ptq("gptq")
@dataclass(frozen=True)
class GPTQ(CalibratedPTQ):
    """Weights by GPTQ, block by block, each block seeing the quantized ones in front; activations as `rtn`.

    Columns are taken in their order (no activation order). A group's range is that of its weights when its first
    column is reached, all corrections included; the released code leaves out those of the current `block`, which
    matters where a group is smaller. `static_groups` takes the ranges of the original weights instead.
    """

    damping: Fraction = 0.01
    block: Annotated[int, Field(ge=1)] = 128
    static_groups: bool = False

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
            grams = block.observe(lambda _: Gram())
            return {
                name: {"weight": self.solve(block.linears[name].weight.detach(), gram.value, weights)}
                for name, gram in grams.items()
            }

        return calibration.block_by_block(linears, find, lambda found: self.plan(found, weights, None))

    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        return LinearPlan(found["weight"].to if weights else None, activations)

    def solve(self, weight: Tensor, gram: Tensor, format: Format, grids: list[Grid] | None = None) -> Tensor:
        """The quantized weight [out, in] that approaches W X in the least squares; `gram` is X X^T [in, in].

        `grids` are those of the groups where they are known already.
        """
        w, width = weight.float().clone(), weight.shape[1]
        dead = gram.diagonal() == 0
        w[:, dead] = 0
        upper = inverse_root(gram + torch.diag(dead.float()), self.damping)
        size = format.group_size or width
        if grids is None and self.static_groups:
            grids = [Grid.of(part, format) for part in w.split(size, dim=1)]
        known, grids = grids is not None, grids or []
        done = torch.zeros_like(w)
        for start in range(0, width, self.block):
            stop = min(start + self.block, width)
            errors = w.new_zeros(len(w), stop - start)
            for column in range(start, stop):
                if column % size == 0 and not known:
                    # Columns of this group beyond the block still lack its corrections.
                    ahead = w[:, column : column + size].clone()
                    if column + size > stop:
                        ahead[:, stop - column :] -= errors @ upper[start:stop, stop : column + size]
                    grids.append(Grid.of(ahead, format))
                done[:, column : column + 1] = grids[column // size](w[:, column : column + 1])
                error = (w[:, column] - done[:, column]) / upper[column, column]
                w[:, column + 1 : stop] -= error.outer(upper[column, column + 1 : stop])
                errors[:, column - start] = error
            w[:, stop:] -= errors @ upper[start:stop, stop:]
        return done.to(weight.dtype)


def inverse_root(gram: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of (gram + damping * mean diagonal)^-1; damped tenfold where that is not definite."""
    identity = torch.eye(len(gram), device=gram.device)
    damp = damping * gram.diagonal().mean()
    for _ in range(8):
        lower, failed = torch.linalg.cholesky_ex(gram + damp * identity)
        if not failed:
            return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        damp = damp * 10 if damp > 0 else gram.diagonal().mean() * 1e-6
    raise ArithmeticError("the inputs of a linear are not finite")
