"""GPTQ: weights are rounded column by column, and later columns compensate for the errors of earlier ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

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
    LinearPlan,
    Rounding,
    kept_rounding,
    packed_tensors,
    ptq,
)


@ptq("gptq")
@dataclass(frozen=True)
class GPTQ(CalibratedPTQ):
    """Round weights column by column so that ||(W - Q) X||^2 is small, where X are the linear's inputs.

    After a column is rounded, the columns not yet rounded are changed so that they compensate for its error in the
    least-squares sense. Columns are taken in their own order (no activation order). The model is calibrated block by
    block, and each block sees the inputs that the quantized blocks before it produce. Activations are rounded
    dynamically, as in `rtn`.

    Two things differ from the released code. By default the range of a group is that of its weights when its first
    column is reached, with all corrections so far; the released code leaves out the corrections of the current block of
    columns, which matters if groups are smaller than a block. If X X^T is not definite, the damping grows tenfold until
    it is.

    Attributes:
        damping: what is added to the diagonal of X X^T, as a fraction of its mean diagonal. The release has 0.01.
        block: columns whose corrections are applied to all later columns at once. It affects the speed, and the
            result only by rounding. The release has 128.
        static_groups: whether the ranges of groups are those of the original weights instead. The release's default is
            false.

    Source:
        GPTQ (Frantar et al., ICLR 2023), algorithm 1.
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
            return {
                name: packed_tensors(*self.on_levels(block.linears[name].weight.detach(), gram.value, weights), weights)
                for name, gram in self.grams(block).items()
            }

        return calibration.block_by_block(linears, find, lambda found: self.plan(found, weights, None))

    def grams(self, block: Block) -> Mapping[str, Gram]:
        """The Gram matrix X X^T of the inputs of each linear of a block."""
        return block.observe(lambda _: Gram())

    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        return LinearPlan(kept_rounding(found) if weights else None, activations)

    def solve(self, weight: Tensor, gram: Tensor, format: Format, grids: Sequence[Rounding] | None = None) -> Tensor:
        """Round a weight so that its product with the inputs X changes little.

        Args:
            weight: [out, in].
            gram: [in, in], X X^T.
            format: format of the weight.
            grids: levels of each group of columns, if they are known already; None takes them from the weight.

        Returns:
            The rounded weight [out, in], in the dtype of `weight`.

        Raises:
            ArithmeticError: `gram` is not finite.
        """
        return self.on_levels(weight, gram, format, grids)[0].to(weight.dtype)

    def on_levels(
        self, weight: Tensor, gram: Tensor, format: Format, grids: Sequence[Rounding] | None = None
    ) -> tuple[Tensor, list[Any]]:
        """The rounded weight [out, in] in float32, and the levels of each group; see `solve`."""
        w, width = weight.to(torch.float32, copy=True), weight.shape[1]
        dead = gram.diagonal() == 0
        w[:, dead] = 0
        upper = inverse_root(with_diagonal(gram, dead), self.damping)
        size, levels = format.group_size or width, format.levels_within(w)
        if grids is None and self.static_groups:
            grids = [levels.of(part) for part in w.split(size, dim=1)]
        known, found = grids is not None, list(grids or [])
        done = torch.zeros_like(w)
        for start in range(0, width, self.block):
            stop = min(start + self.block, width)
            errors = w.new_zeros(len(w), stop - start)
            for column in range(start, stop):
                if column % size == 0 and not known:
                    # Columns of this group after the block have not got the block's corrections yet.
                    ahead = w[:, column : column + size].clone()
                    if column + size > stop:
                        ahead[:, stop - column :] -= errors @ upper[start:stop, stop : column + size]
                    found.append(levels.of(ahead))
                done[:, column : column + 1] = found[column // size](w[:, column : column + 1])
                error = (w[:, column] - done[:, column]) / upper[column, column]
                w[:, column + 1 : stop] -= error.outer(upper[column, column + 1 : stop])
                errors[:, column - start] = error
            w[:, stop:] -= errors @ upper[start:stop, stop:]
        return done, found


def with_diagonal(gram: Tensor, added: Tensor) -> Tensor:
    """A copy of a matrix [in, in] with values, or one value, added to its diagonal.

    A matrix of a wide linear takes hundreds of MB, so no identity is made.
    """
    made = gram.clone()
    made.diagonal().add_(added)
    return made


def inverse_root(gram: Tensor, damping: float) -> Tensor:
    """Compute the upper Cholesky factor of (gram + damping * mean diagonal * I)^-1.

    As long as the sum is not positive definite, the damping grows tenfold.

    Args:
        gram: [in, in], symmetric.
        damping: a fraction of the mean diagonal.

    Raises:
        ArithmeticError: no damping tried makes the sum positive definite, which means that `gram` is not finite.
    """
    mean = gram.diagonal().mean()
    damp = damping * mean
    for _ in range(8):
        lower, failed = torch.linalg.cholesky_ex(with_diagonal(gram, damp))
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            del lower  # three such matrices are in memory instead of four
            return torch.linalg.cholesky(inverse, upper=True)
        damp = damp * 10 if damp > 0 else mean * 1e-6
    raise ArithmeticError("the inputs of a linear are not finite")
