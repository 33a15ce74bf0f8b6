"""QuaRot: Hadamard rotations of the residual stream and of what enters output and down projections."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn, ones_like, where

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
    Transform,
    kept_rounding,
    ptq,
)

from .mquant import MQuant


@ptq("quarot")
@dataclass(frozen=True)
class QuaRot(CalibratedPTQ):
    """Rotate inputs and outputs of the linears as QuaRot's model does, clip the ranges of weights, and round them.

    The residual stream is rotated by Q, a Hadamard transform with random signs, the same in every layer. Linears that
    read an RMSNorm take its weight g over: x / g is rotated, and W diag(g) with it. Other linears (output and down
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
        rounder = MQuant(rounding=self.rounding, damping=self.damping)

        def find(block: Block) -> CalibrationResult:
            found: CalibrationResult = {}
            grams = block.observe(lambda _: Gram())
            for group in block.groups():
                norm: Any = None if group.norm is None else calibration.model.get_submodule(group.norm)
                for name, linear in group.linears.items():
                    found[name] = self.turns(block, name, linear, norm)
                    if weights is not None:
                        turned = turned_by(found[name])
                        gram = turned.input(turned.input(grams[name].value).mT) if self.rounding == "gptq" else None
                        found[name] |= rounder.rounded(turned.weight(linear.weight.detach()), gram, weights)
            return found

        return calibration.block_by_block(linears, find, lambda found: self.plan(found, weights, None))

    def turns(self, block: Block, name: str, linear: nn.Linear, norm: Any) -> dict[str, Tensor]:
        """What rotates one linear: of its input "scale", "signs" and "mixer", of its output "out_signs", "out_mixer".

        The width of the output's rotation may divide the output: then it acts on each part, such as a head.

        Args:
            block: the block.
            name: name of the linear.
            linear: the linear.
            norm: the norm whose output it reads; None if it reads something else.
        """
        stream = norm is not None
        ins = self.rotation(linear.in_features, signs=stream)
        found: dict[str, Tensor] = {"signs": ins.signs, "mixer": ins.mixer}
        if stream and getattr(norm, "bias", None) is None and getattr(norm, "weight", None) is not None:
            found["scale"] = norm.weight.detach().float()
        head = getattr(getattr(block.module, "self_attn", None), "head_dim", None)
        outs = None
        if not stream:
            outs = self.rotation(linear.out_features, signs=True)
        elif name.endswith("v_proj") and head:
            outs = self.rotation(head, signs=False)
        if outs is not None:
            found |= {"out_signs": outs.signs, "out_mixer": outs.mixer}
            if linear.bias is not None:
                found["bias"] = linear.bias.detach()
        return found

    def online_rotations(self, inward: int, outward: int, of_norm: bool) -> tuple[int, ...]:
        """Those of what enters output and down projections. All others can be folded into weights."""
        return () if of_norm else (inward,)

    def rotation(self, width: int, signs: bool) -> Rotation:
        """The Hadamard transform of a width, with random signs or without."""
        drawn = Rotation.random(width, self.seed)
        mixer = drawn.mixer if len(drawn.mixer) > 1 else ones_like(drawn.mixer)  # Hadamard has no sign of its own
        return Rotation(drawn.signs if signs else ones_like(drawn.signs), mixer)

    def plan(self, found: Mapping[str, Tensor], weights: Format | None, activations: Format | None) -> LinearPlan:
        return LinearPlan(kept_rounding(found) if weights else None, activations, turned_by(found))


class Turned(Transform):
    """Rotation of a linear's input, which may take a norm's weight g over: W x = (W diag(g) R^T) (R (x / g)).

    Args:
        ins: R.
        scale: [in], g; None leaves it out.
    """

    def __init__(self, ins: Rotation, scale: Tensor | None) -> None:
        self.ins, self.scale = ins, scale

    def input(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return self.ins(x)
        scale = self.scale.to(x.device)
        return self.ins(x.float() / where(scale == 0, 1, scale))  # a channel of weight 0 is 0

    def weight(self, w: Tensor) -> Tensor:
        return self.ins(w if self.scale is None else w.float() * self.scale.to(w.device))


class TurnedBoth(Turned):
    """The same, with the output rotated too, in parts of the width of U: y = U^T (U W' x') + bias.

    Args:
        ins: R.
        scale: [in], g; None leaves it out.
        outs: U.
        bias: [out], the linear's bias; None if it has none.
    """

    def __init__(self, ins: Rotation, scale: Tensor | None, outs: Rotation, bias: Tensor | None) -> None:
        super().__init__(ins, scale)
        self.outs, self.bias = outs, bias

    def weight(self, w: Tensor) -> Tensor:
        parts = super().weight(w).mT.unflatten(-1, (-1, len(self.outs.signs)))
        return self.outs(parts).flatten(-2).mT.contiguous()

    def output(self, y: Tensor) -> Tensor:
        """Rotate the output back. The linear has already added its bias, which belongs after U^T."""
        bias = 0 if self.bias is None else self.bias.float()
        return self.outs.inverse((y.float() - bias).unflatten(-1, (-1, len(self.outs.signs)))).flatten(-2) + bias


def turned_by(found: Mapping[str, Tensor]) -> Turned:
    """The transform that `QuaRot.turns` describes."""
    ins, scale = Rotation(found["signs"], found["mixer"]), found.get("scale")
    if "out_signs" not in found:
        return Turned(ins, scale)
    return TurnedBoth(ins, scale, Rotation(found["out_signs"], found["out_mixer"]), found.get("bias"))
