"""What FlatQuant learns of one block: the maps of its linears' inputs, and the shares of ranges."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qapbench import (
    Block,
    CalibrationResult,
    Format,
    Grid,
    Kronecker,
    KroneckerHeads,
    LearnedMatrix,
    kronecker_by,
    near_square,
    packed_tensors,
)

from .clipped_levels import ClippedInput, clip_rounded
from .places import places

CLIP = 4.0  # initial share of a range, before the sigmoid that makes it 0.982
TINY = 1e-5


@dataclass
class _Maps:
    """The learned map of one input: P1, P2, and d [in]."""

    left: LearnedMatrix
    right: LearnedMatrix
    scale: Tensor
    clip: Tensor  # [2], shares of a token's range before the sigmoid


class FlatBlock:
    """The learned parameters of one block.

    Args:
        model: the model.
        block: the block.
        largest: [in] largest magnitude of each channel of a linear's input, by the linear's name.
        weights: format of the weights; None leaves them as they are.
        activations: format of the activations; None leaves them as they are.
        alpha: exponent of `largest` in the initial d.
        seed: of the matrices at the start.

    Attributes:
        maps: parameters of the maps.
        clips: parameters of the shares of ranges.
    """

    def __init__(
        self,
        model: nn.Module,
        block: Block,
        largest: Mapping[str, Tensor],
        weights: Format | None,
        activations: Format | None,
        alpha: float,
        seed: int,
    ) -> None:
        self.places, self.weights, self.activations = places(model, block), weights, activations
        draw = torch.Generator().manual_seed(seed)
        heads = [place.head for place in self.places.values() if place.values and place.head]
        self.head = LearnedMatrix(heads[0], draw) if heads else None
        self.of: dict[str, _Maps] = {}
        for group in block.groups():
            name, linear = next(iter(group.linears.items()))
            reads = self.head is not None and self.places[name].values == "reads"
            width, size = linear.in_features, heads[0] if reads else 0
            sizes = (width // size, size) if reads else near_square(width)
            right = self.head if reads and self.head else LearnedMatrix(sizes[1], draw)
            most = torch.stack([one.weight.detach().float().abs().amax(dim=0) for one in group.linears.values()])
            ends = most.amax(dim=0).clamp(min=TINY), largest[name].to(most.device).clamp(min=TINY)
            scale = (ends[0] ** (1 - alpha) / ends[1] ** alpha).clamp(min=TINY)
            self.of |= dict.fromkeys(
                group.linears,
                _Maps(LearnedMatrix(sizes[0], draw), right, scale, torch.full((2,), CLIP, dtype=torch.float32)),
            )
        self.cut = {name: self._cut(place.linear) for name, place in self.places.items()} if weights else {}
        inputs = list({id(maps): maps for maps in self.of.values()}.values())
        matrices = {id(m): m for maps in inputs for m in (maps.left, maps.right)}
        self.maps = [p for m in matrices.values() for p in m.parameters] + [maps.scale for maps in inputs]
        self.clips = [*self.cut.values(), *([maps.clip for maps in inputs] if activations else [])]
        for parameter in (*self.maps, *self.clips):
            parameter.requires_grad_(True)

    def _cut(self, linear: nn.Linear) -> Tensor:
        """[2, out, groups, 1] shares of the ranges of a weight, before the sigmoid."""
        size = (self.weights.group_size if self.weights else None) or linear.in_features
        shape = (2, linear.out_features, -(-linear.in_features // size), 1)
        return torch.full(shape, CLIP, dtype=torch.float32, device=linear.weight.device)

    def transform(self, name: str, dtype: torch.dtype = torch.float32) -> Kronecker:
        """The transform of a linear as it is now."""
        maps, place = self.of[name], self.places[name]
        both = maps.left.matrix(dtype), maps.right.matrix(dtype)
        if place.values != "writes" or self.head is None:
            return Kronecker(*both, maps.scale)
        return KroneckerHeads(*both, maps.scale, self.head.matrix(dtype), place.linear.bias)

    def held(self) -> dict[str, Tensor]:
        """The weights that linears hold meanwhile: mapped, cut, rounded and mapped back behind the linear."""
        new = {}
        for name, place in self.places.items():
            transform = self.transform(name)
            values, _ = self.rounded(name, transform)
            new[name] = transform.rows_undone(values).to(place.linear.weight.dtype)
        return new

    def read(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """What linears read meanwhile: mapped and rounded inputs."""
        return {name: functools.partial(self._read, self.transform(name), self.of[name].clip) for name in self.places}

    def _read(self, transform: Kronecker, clip: Tensor, x: Tensor) -> Tensor:
        mapped = transform.input(x)
        return mapped if self.activations is None else ClippedInput(self.activations, *clip)(mapped)

    def rounded(self, name: str, transform: Kronecker) -> tuple[Tensor, list[Grid]]:
        """A mapped weight [out, in], cut to the shares of its ranges and rounded, and its levels."""
        columns = Kronecker.weight(transform, self.places[name].linear.weight.detach())
        if self.weights is None:
            return transform.rows(columns), []
        return clip_rounded(columns, self.cut[name], self.weights, transform.rows)

    def found(self) -> CalibrationResult:
        """What was learned, for `plan`. Maps are computed in float64, so that they and their inverses agree."""
        found: CalibrationResult = {}
        for name, place in self.places.items():
            exact = self.transform(name, torch.float64)
            pairs: dict[str, Any] = {"left": exact.left, "right": exact.right, "head": getattr(exact, "head", None)}
            mine = {key: torch.stack([m.value, m.dual]).float() for key, m in pairs.items() if m is not None}
            mine |= {"scale": self.of[name].scale, "clip": self.of[name].clip}
            if "head" in mine and place.linear.bias is not None:
                mine["bias"] = place.linear.bias
            mine = {key: value.detach().clone() for key, value in mine.items()}
            if self.weights is not None:
                values, grids = self.rounded(name, kronecker_by(mine))
                mine |= packed_tensors(values.detach(), [_detached(grid) for grid in grids], self.weights)
            found[name] = mine
        return found


def _detached(grid: Grid) -> Grid:
    return grid._replace(scale=grid.scale.detach(), zero=grid.zero.detach())
