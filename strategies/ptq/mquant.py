"""MQuant (Yu et al., ACM MM 2025): rotated, static scales for each modality, tokens put in order of modality."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

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
    TokenActivation,
    Tokens,
    Transform,
    ptq,
)

from .gptq import GPTQ

SHRINK = 80  # steps of the search for a weight's range, of which
LEAST = 0.2  # is the smallest share that is tried
NORM = 2.4  # the error's exponent, as GPTQ's code has it


@ptq("mquant")
@dataclass(frozen=True)
class MQuant(CalibratedPTQ):
    """x -> R x with R a Hadamard transform; weights by GPTQ or rounding in clipped ranges; static activation scales.

    MSQ (section 3.2): each linear has one range for visual tokens and one for all others, both from calibration.
    AIFS (section 3.3) puts the visual tokens in front, so that a kernel needs two scales for two slices. It permutes
    causal attention's rows and columns and leaves every answer as it is; `modality_first` does it and the tests show
    it. In a simulation each token simply takes its modality's scale. A modality that calibration never showed
    takes the other's. Activations have to be of the granularity `tensor`. The release folds R into the weights in
    front where it can; here it stays at the linear, so a norm's weight comes before R and not after.
    """

    rounding: Literal["gptq", "rtn"] = "gptq"
    damping: Fraction = 0.01
    seed: Annotated[int, Field(ge=0)] = 0

    formats = (Format(bits=4, symmetric=True), Format(bits=8, symmetric=True, granularity="tensor"))
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
                    found[name]["weight"] = self.rounded(rotation(linear.weight.detach()), gram, weights)
            return found

        return calibration.block_by_block(linears, find, lambda found: self.plan(found, weights, None))

    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        transform = Rotated(Rotation(found["signs"], found["mixer"]))
        static = ByModality(activations, found["vision"], found["text"]) if activations else None
        return LinearPlan(found["weight"].to if weights else None, static, transform)

    def rounded(self, w: Tensor, gram: Tensor | None, format: Format) -> Tensor:
        """w [out, in] on the format's levels, in clipped ranges; with a `gram` [in, in] errors are made up for."""
        parts = w.split(format.group_size or w.shape[1], dim=1)
        grids = [clipped(part, format) for part in parts]
        if gram is not None:
            return GPTQ(damping=self.damping).solve(w, gram, format, grids)
        return torch.cat([grid(part) for grid, part in zip(grids, parts, strict=True)], dim=1)

    def rotation(self, linear: nn.Linear) -> Rotation:
        return Rotation.random(linear.in_features, self.seed)


@dataclass(frozen=True)
class Rotated(Transform):
    """W x = (W R^T) (R x)."""

    rotation: Rotation

    def input(self, x: Tensor) -> Tensor:
        return self.rotation(x)

    def weight(self, w: Tensor) -> Tensor:
        return self.rotation(w)


class Ranges:
    """Lowest and highest value of the rotated input, over the tokens of each modality."""

    def __init__(self, rotation: Rotation) -> None:
        self.rotation = rotation
        self.ends: dict[str, list[Tensor]] = {"vision": [], "text": []}

    def __call__(self, x: Tensor, vision: Tensor) -> None:
        for name, mask in (("vision", vision), ("text", ~vision)):
            if mask.any():
                self.ends[name].append(torch.stack(self.rotation(x[mask]).aminmax()))

    @property
    def found(self) -> dict[str, Tensor]:
        """[2] of each modality."""
        seen = {name: torch.stack(ends) for name, ends in self.ends.items() if ends}
        both = {name: torch.stack([ends[:, 0].min(), ends[:, 1].max()]) for name, ends in seen.items()}
        return {name: both.get(name, next(iter(both.values()))) for name in self.ends}


class ByModality(TokenActivation):
    """One static scale for visual tokens, one for all others.

    Args:
        vision, text: [2], the range of each.
    """

    def __init__(self, format: Format, vision: Tensor, text: Tensor) -> None:
        self.grids = [format.levels.grid(*(end.reshape(1) for end in ends)) for ends in (vision, text)]

    def __call__(self, x: Tensor, tokens: Tokens | None = None) -> Tensor:
        visual, other = (self._on(x.device, grid)(x) for grid in self.grids)
        return other if tokens is None else torch.where(tokens.vision.unsqueeze(-1), visual, other)

    def _on(self, device: torch.device, grid: Grid) -> Grid:
        return grid._replace(scale=grid.scale.to(device), zero=grid.zero.to(device))


def modality_first(vision: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """AIFS: an order with the visual tokens in front, and the attention mask with which it changes nothing.

    Args:
        vision, valid: [B, L] bool.

    Returns:
        order [B, L], the place from which each token comes: gather embeddings and position ids with it, and scatter
        outputs back; mask [B, 1, L, L] bool, True where the token of a row may look at that of a column, which stood
        before it.
    """
    order = (~vision).to(torch.int8).argsort(dim=-1, stable=True)
    seen = valid.gather(1, order).unsqueeze(1)
    causal = order.unsqueeze(1) <= order.unsqueeze(2)
    itself = torch.eye(vision.shape[1], dtype=torch.bool, device=vision.device)  # a padded row may not be empty
    return order, ((causal & seen) | itself).unsqueeze(1)


def clipped(w: Tensor, format: Format) -> Grid:
    """The grid of each row of w whose range, shrunk by a share of its own, loses least: sum |error|^2.4."""
    low, high = w.amin(dim=1, keepdim=True), w.amax(dim=1, keepdim=True)
    best, least = torch.ones_like(low), torch.full_like(low, torch.inf)
    for step in range(int(SHRINK * (1 - LEAST))):
        share = 1 - step / SHRINK
        error = (format.levels.grid(low * share, high * share)(w) - w).abs().pow(NORM).sum(dim=1, keepdim=True)
        best, least = torch.where(error < least, share, best), torch.minimum(error, least)
    return format.levels.grid(low * best, high * best)
