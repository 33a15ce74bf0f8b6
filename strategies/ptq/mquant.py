"""MQuant: rotated inputs, and static activation scales for visual and text tokens apart."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qapbench import (
    Block,
    CalibratedPTQ,
    Calibration,
    CalibrationResult,
    FloatGrid,
    FloatLevels,
    Format,
    Fraction,
    Gram,
    Grid,
    Levels,
    LinearPlan,
    Rotated,
    Rotation,
    TokenActivation,
    Tokens,
    kept_rounding,
    packed_tensors,
    ptq,
    rotation_flops,
)

from .gptq import GPTQ

SHARES = tuple(1 - step / 100 for step in range(80))  # shares of a weight's range that are tried, as in GPTQ's code
NORM = 2.4  # exponent of the error in that search, as in GPTQ's code


@ptq("mquant")
@dataclass(frozen=True)
class MQuant(CalibratedPTQ):
    """Rotate inputs, round weights by GPTQ in clipped ranges, and give visual and other tokens static scales.

    The input becomes R x, where R is a Hadamard transform with random signs, and the weight W R^T. The range of each
    group of weights is shrunk to the share of it, 1, 0.99, ..., 0.21, with the least sum of |error|^2.4.

    Symmetric levels are all 2^b, from -2^(b-1) to 2^(b-1) - 1 (`divisor: full`, which a format without a `divisor` of
    its own takes here). A weight's range is symmetric, [-p max|w|, p max|w|], so its scale is p max|w| / (2^(b-1) - 1).
    The static scale of an activation is max(|min| / 2^(b-1), max / (2^(b-1) - 1)).

    Modality-specific static quantization (MSQ, section 3.2): each linear has one activation range for visual tokens and
    one for all others, both from calibration. A modality that calibration never showed takes the other's range.
    Activations must have the granularity `tensor`.

    Attention-invariant flexible switching (AIFS, section 3.3) moves the visual tokens to the front, so that a kernel
    can apply the two scales to two slices. It permutes rows and columns of causal attention and changes no answer,
    which a test shows. It is therefore left out here: in a simulation, each token simply takes the scale of its
    modality.

    One thing differs from the released code. It folds R into the weights before the linear if it can; here R stays at
    the linear, so a norm's weight is applied before R and not after it.

    Attributes:
        rounding: how weights are rounded. "gptq" compensates for errors as the method `gptq` does; "rtn" rounds to
            nearest. The release offers both and takes GPTQ by default.
        damping: for "gptq", what is added to the diagonal of X X^T, as a fraction of its mean diagonal. The release has
            0.01.
        seed: seed of the random R. Linears of the same input width have the same R.

    Source:
        MQuant (Yu et al., ACM MM 2025), sections 3.2 and 3.3. Levels, scales and the search are those of the released
        code (StiphyJay/MQuant at 7b3e819, August 2025).
    """

    rounding: Literal["gptq", "rtn"] = "gptq"
    damping: Fraction = 0.01
    seed: Annotated[int, Field(ge=0)] = 0

    formats = (
        Format(bits=4, symmetric=True, divisor="full"),
        Format(bits=8, symmetric=True, granularity="tensor", divisor="full"),
    )
    activation_granularities = ("tensor",)

    def calibrate(
        self,
        calibration: Calibration,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
    ) -> CalibrationResult:
        def find(block: Block) -> CalibrationResult:
            grams = block.observe(lambda _: Gram()) if weights and self.rounding == "gptq" else {}
            found: CalibrationResult = {}
            for name, seen in block.observe(lambda linear: Ranges(self.rotation(linear))).items():
                linear = block.linears[name]
                rotation = self.rotation(linear)
                found[name] = {"signs": rotation.signs, "mixer": rotation.mixer, **seen.found}
                if weights is not None:
                    gram = rotation(rotation(grams[name].value).mT) if grams else None
                    found[name] |= self.rounded(rotation(linear.weight.detach()), gram, weights)
            return found

        return calibration.block_by_block(linears, find, lambda found: self.plan(found, weights, None))

    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        transform = Rotated(Rotation(found["signs"], found["mixer"]))
        static = ByModality(activations, found["vision"], found["text"]) if activations else None
        return LinearPlan(kept_rounding(found) if weights else None, static, transform)

    def online_flops(self, name: str, inward: int, outward: int, of_norm: bool) -> int:
        """Rotations of inputs that no norm gives. The release folds the others into the weights in front."""
        return 0 if of_norm else rotation_flops(inward)

    def rounded(self, w: Tensor, gram: Tensor | None, format: Format) -> dict[str, Tensor]:
        """Round a weight to the levels of a format, in clipped ranges, as tensors for the result of the calibration.

        Args:
            w: [out, in] weight, rotated.
            gram: [in, in], X X^T of the rotated inputs, for rounding by GPTQ; None rounds to nearest.
            format: format of the weight.
        """
        parts = w.split(format.group_size or w.shape[1], dim=1)
        grids = [clipped(part, format, w) for part in parts]
        if gram is not None:
            return packed_tensors(*GPTQ(damping=self.damping).on_levels(w, gram, format, grids), format)
        return packed_tensors(
            torch.cat([grid(part) for grid, part in zip(grids, parts, strict=True)], 1), grids, format
        )

    def rotation(self, linear: nn.Linear) -> Rotation:
        """The rotation of a linear's input."""
        return Rotation.random(linear.in_features, self.seed)


class Ranges:
    """Observer of a linear's rotated input: its lowest and highest value over the tokens of each modality.

    Args:
        rotation: applied to the input.
    """

    def __init__(self, rotation: Rotation) -> None:
        self.rotation = rotation
        self.ends: dict[str, list[Tensor]] = {"vision": [], "text": []}

    def __call__(self, x: Tensor, vision: Tensor) -> None:
        for name, mask in (("vision", vision), ("text", ~vision)):
            if mask.any():
                self.ends[name].append(torch.stack(self.rotation(x[mask]).aminmax()))

    @property
    def found(self) -> dict[str, Tensor]:
        """Lowest and highest value [2] of "vision" and "text". A modality never seen has the values of the other."""
        seen = {name: torch.stack(ends) for name, ends in self.ends.items() if ends}
        both = {name: torch.stack([ends[:, 0].min(), ends[:, 1].max()]) for name, ends in seen.items()}
        return {name: both.get(name, next(iter(both.values()))) for name in self.ends}


class ByModality(TokenActivation):
    """Quantization with one static scale for visual tokens and one for all others.

    Args:
        format: supplies the convention for levels.
        vision: [2], lowest and highest value of visual tokens.
        text: [2], lowest and highest value of all other tokens.
    """

    def __init__(self, format: Format, vision: Tensor, text: Tensor) -> None:
        self.grids = [levels_of(format).grid(*(end.reshape(1) for end in ends)) for ends in (vision, text)]

    def __call__(self, x: Tensor, tokens: Tokens | None = None) -> Tensor:
        visual, other = (grid(x) for grid in self.grids)
        return other if tokens is None else torch.where(tokens.vision.unsqueeze(-1), visual, other)


def levels_of(format: Format, w: Tensor | None = None) -> Levels | FloatLevels:
    """Convention by which a range (of a part of w) becomes levels: the format's, with all 2^b levels if symmetric."""
    levels = format.levels if w is None else format.levels_within(w)
    return replace(levels, divisor="full") if isinstance(levels, Levels) and levels.divisor == "qmax" else levels


def clipped(w: Tensor, format: Format, whole: Tensor | None = None) -> Grid | FloatGrid:
    """Find the levels of each row of w [out, G]: its range, shrunk to the share with the least sum of |error|^2.4.

    Args:
        w: a group of columns.
        format: format of the weight.
        whole: the weight of which w is a part; None if it is the weight itself.
    """
    levels = levels_of(format, w if whole is None else whole)
    low, high = w.amin(dim=1, keepdim=True), w.amax(dim=1, keepdim=True)
    if format.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    best, least = torch.ones_like(low), torch.full_like(low, torch.inf)
    for share in SHARES:
        error = (levels.grid(low * share, high * share)(w) - w).abs().pow(NORM).sum(dim=1, keepdim=True)
        best, least = torch.where(error < least, share, best), torch.minimum(error, least)
    return levels.grid(low * best, high * best)
