"""OmniQuant: the clipping of weights and the scales between input and weight are learned, block by block."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from qapbench import (
    AbsMaxObserver,
    Block,
    CalibratedPTQ,
    Calibration,
    CalibrationResult,
    Format,
    Fraction,
    Grid,
    Levels,
    LinearPlan,
    PackedWeight,
    Scaling,
    grouped,
    packed_on,
    ptq,
)

from .full_precision import FullPrecision

CLIP = 4.0  # initial clipping strength before the sigmoid, which makes it 0.982 of the range
FLOOR = 1e-5  # smallest scale
Rate = Annotated[float, Field(gt=0)]


@ptq("omniquant")
@dataclass(frozen=True)
class OmniQuant(CalibratedPTQ):
    """Learn clipping strengths and channel scales of each block, then round to nearest.

    For each block, ||F(W, X) - F(Q(W s; g, b), Q(X' / s))||^2 is minimised over clipping strengths g, b and scales s,
    by AdamW with one sample per step. F is the block and X its inputs in full precision; X' are the inputs that the
    quantized blocks before it produce.

    Learned weight clipping (eq. 2): the range of each group of weights is [sigmoid(b) min, sigmoid(g) max]. Learned
    equivalent transformation (eq. 3): each input channel of a linear has a scale, which starts at
    max|x|^alpha / max|W|^(1 - alpha). As published, scales are learned only if activations are quantized.

    Three things differ from the released code. Scales stay at the input, so all linears have them, down projections
    too. There is no shift of activations, which the release does not use for LLaMA either. There is no scale between
    queries and keys.

    Attributes:
        epochs: passes over the calibration samples per block. 0 learns nothing and keeps the initial values.
            The release's script for Llama-2-7B at W4A4 has 20.
        lwc_lr: learning rate of the clipping strengths. The release has 1e-2.
        let_lr: learning rate of the scales. The release's script for Llama-2-7B at W4A4 has 1e-3.
        alpha: exponent of the input's largest magnitude in the initial scales; the weight's has 1 - alpha. The
            release's script for Llama-2-7B at W4A4 has 0.75.

    Source:
        OmniQuant (Shao et al., ICLR 2024), eq. 2 and 3.
    """

    epochs: Annotated[int, Field(ge=0)] = 20
    lwc_lr: Rate = 1e-2
    let_lr: Rate = 1e-3
    alpha: Fraction = 0.75

    weight_formats = ("int",)  # a floating-point scale takes few values, so that there is no gradient to learn from

    def calibrate(
        self,
        calibration: Calibration,
        linears: Mapping[str, nn.Linear],
        weights: Format | None,
        activations: Format | None,
    ) -> CalibrationResult:
        plain = FullPrecision()

        def find(block: Block) -> CalibrationResult:
            exact = plain.outputs(block)
            inputs = block.observe(lambda _: AbsMaxObserver())
            scales = self.start(block, inputs) if activations else {}
            learner = Learner(block, {name: linears[name] for name in inputs}, scales, weights, activations)
            learner.fit(exact, self.epochs, self.lwc_lr, self.let_lr)
            return learner.found()

        return calibration.block_by_block(linears, find, lambda found: self.plan(found, weights, activations))

    def start(self, block: Block, inputs: Mapping[str, AbsMaxObserver]) -> dict[str, Tensor]:
        """Compute the initial scale [in] of each linear. Linears that read the same input share one tensor.

        Args:
            block: the block.
            inputs: largest magnitude of each input channel, by name of the linear.
        """
        scales: dict[str, Tensor] = {}
        for group in block.groups():
            x = inputs[next(iter(group.linears))].value.clamp(min=FLOOR)
            w = torch.stack([linear.weight.detach().float().abs().amax(dim=0) for linear in group.linears.values()])
            scale = (x**self.alpha / w.amax(dim=0).clamp(min=FLOOR) ** (1 - self.alpha)).clamp(min=FLOOR)
            scales |= dict.fromkeys(group.linears, scale)
        return scales

    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        transform = Scaling(found["scale"]) if "scale" in found else None
        if weights is None:
            return LinearPlan(None, activations, transform)
        return LinearPlan(LearnedClip(found["high"], found["low"], weights), activations, transform)


@dataclass(frozen=True)
class LearnedClip:
    """Rounding of a weight in learned ranges.

    Attributes:
        high: [out, groups] clipping strengths of the upper ends, before the sigmoid.
        low: [out, groups] clipping strengths of the lower ends.
        format: format of the weight.
    """

    high: Tensor
    low: Tensor
    format: Format

    def __call__(self, w: Tensor) -> Tensor:
        return clip_quantize(w, self.high.to(w.device), self.low.to(w.device), self.format)

    def packed(self, w: Tensor) -> PackedWeight:
        grids = clipped_grids(w, self.high.to(w.device), self.low.to(w.device), self.format)
        return packed_on(self(w), grids, self.format)


class Learner:
    """The learned parameters of one block, and their optimisation.

    Args:
        block: the block, with the inputs that the quantized blocks before it produce.
        linears: its linears, by name.
        scales: initial scales [in], by name of the linear; empty if none are learned.
        weights: format of the weights; None leaves them as they are.
        activations: format of the activations; None leaves them as they are.
    """

    def __init__(
        self,
        block: Block,
        linears: Mapping[str, nn.Linear],
        scales: Mapping[str, Tensor],
        weights: Format | None,
        activations: Format | None,
    ) -> None:
        self.block, self.linears, self.weights, self.activations = block, linears, weights, activations
        own = {id(scale): nn.Parameter(scale.clone()) for scale in scales.values()}
        self.scales = {name: own[id(scale)] for name, scale in scales.items()}
        self.clips = {name: self._clip(linear) for name, linear in self.linears.items()} if weights else {}

    def _clip(self, linear: nn.Linear) -> tuple[nn.Parameter, nn.Parameter]:
        size = (self.weights.group_size if self.weights else None) or linear.in_features
        shape = (linear.out_features, -(-linear.in_features // size))
        high, low = (
            nn.Parameter(torch.full(shape, CLIP, device=linear.weight.device, dtype=torch.float32)) for _ in range(2)
        )
        return high, low

    def fit(self, wanted: list[Tensor], epochs: int, lwc_lr: float, let_lr: float) -> None:
        """Minimise the squared error of the quantized block's output.

        Args:
            wanted: output of the block in full precision, for each sample.
            epochs: passes over the samples.
            lwc_lr: learning rate of the clipping strengths.
            let_lr: learning rate of the scales.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        clips = [parameter for pair in self.clips.values() for parameter in pair]
        scales = list({id(scale): scale for scale in self.scales.values()}.values())
        learned = [*clips, *scales]
        groups = [{"params": p, "lr": lr} for p, lr in ((clips, lwc_lr), (scales, let_lr)) if p]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        with torch.enable_grad():
            for _ in range(epochs):
                for index, target in enumerate(wanted):
                    loss = self.block.off(index, self.output(index), target).mean()
                    if not torch.isfinite(loss):
                        raise ArithmeticError(f"{self.block.name}: the loss is not finite; lower lwc_lr and let_lr")
                    # `backward` would leave gradients at the model's own parameters.
                    for parameter, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
                        parameter.grad = gradient
                    optimizer.step()
                    for scale in scales:
                        scale.data.clamp_(min=FLOOR)

    def output(self, index: int) -> Tensor:
        """Run the quantized block on its input for a sample. Gradients reach clipping strengths and scales."""
        weights = {name: self.weight(name) for name in self.linears}
        inputs = {name: functools.partial(self.input, name) for name in self.linears}
        return self.block.forward(self.block.passes[index], weights, inputs)

    def weight(self, name: str) -> Tensor:
        """The scaled, clipped and rounded weight [out, in] of a linear, as a function of what is learned."""
        original = self.linears[name].weight.detach()
        w = original.float() * self.scales[name] if name in self.scales else original.float()
        new = clip_quantize(w, *self.clips[name], self.weights) if self.weights else w
        return new.to(original.dtype)

    def input(self, name: str, x: Tensor) -> Tensor:
        """The scaled and rounded input of a linear, as a function of what is learned."""
        scaled = x.float() / self.scales[name] if name in self.scales else x.float()
        return LinearPlan(None, self.activations).new_input(scaled, self.block.current[0])

    def found(self) -> CalibrationResult:
        """What was learned: "scale" [in], "high" and "low" [out, groups] of each linear that has them."""
        found: CalibrationResult = {name: {} for name in self.linears}
        for name, scale in self.scales.items():
            if name in found:
                found[name]["scale"] = scale.detach().clone()
        for name, (high, low) in self.clips.items():
            found[name] |= {"high": high.detach(), "low": low.detach()}
        return found


def clip_quantize(w: Tensor, high: Tensor, low: Tensor, format: Format) -> Tensor:
    """Quantize and dequantize a weight in ranges [sigmoid(low) min, sigmoid(high) max], differentiably.

    Args:
        w: [out, in].
        high: [out, groups] clipping strengths of the upper ends, before the sigmoid.
        low: [out, groups] clipping strengths of the lower ends.
        format: format of the weight.

    Returns:
        [out, in] float32.
    """
    parts, grids = grouped(w.float(), format.group_size), clipped_grids(w, high, low, format)
    return torch.cat([grid(part).flatten(1) for grid, part in zip(grids, parts, strict=True)], dim=1)


def clipped_grids(w: Tensor, high: Tensor, low: Tensor, format: Format) -> list[Grid]:
    """The levels of each part that `grouped` cuts a weight into; the arguments are those of `clip_quantize`."""
    grids, start = [], 0
    for part in grouped(w.float(), format.group_size):
        stop = start + part.shape[1]
        least = part.amin(dim=-1, keepdim=True) * low[:, start:stop].sigmoid().unsqueeze(-1)
        most = part.amax(dim=-1, keepdim=True) * high[:, start:stop].sigmoid().unsqueeze(-1)
        grids.append(Levels(format.bits, format.symmetric, format.divisor, format.zero_point).grid(least, most))
        start = stop
    return grids
