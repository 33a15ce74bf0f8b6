"""Where the linears of a block stand, for methods that rotate the residual stream and the heads' values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qapbench import Block

ENDS: tuple[Literal["writes", "reads"] | None, ...] = (None, "writes", "reads")


@dataclass(frozen=True)
class Place:
    """Where a linear stands.

    Attributes:
        linear: the linear.
        block: name of its block in the model.
        decoder: whether it belongs to the language model, or to a model of no known family.
        stream: whether it reads the residual stream, behind a norm. A linear that does not writes it.
        gain: [in] float32, the gain of that norm; None if there is none, or the norm has a bias.
        head: width of a head, if the linear reads or writes the values of heads.
        values: whether it writes the values of heads ("writes") or reads them ("reads"); None for neither.
    """

    linear: nn.Linear
    block: str
    decoder: bool
    stream: bool
    gain: Tensor | None
    head: int | None
    values: Literal["writes", "reads"] | None

    @property
    def stream_key(self) -> tuple[str, int]:
        """Which residual stream it reads or writes: no block, as it goes through all of them, and its width."""
        return "", self.linear.in_features if self.stream else self.linear.out_features

    @property
    def head_key(self) -> tuple[str, int]:
        """Which heads' values it reads or writes: the block, and the width of a head, or 0 for none."""
        return self.block, (self.head or 0) if self.values else 0


def stored(place: Place) -> dict[str, Tensor]:
    """A place as tensors, which a calibration can hand back; see `restored`."""
    numbers = [place.decoder, place.stream, place.head or 0, ENDS.index(place.values)]
    found = {"place": torch.tensor(numbers), "block": torch.tensor(list(place.block.encode()), dtype=torch.uint8)}
    return found if place.gain is None else {**found, "gain": place.gain}


def restored(linear: nn.Linear, found: Mapping[str, Tensor]) -> Place:
    """The place of a linear that `stored` has made tensors of."""
    decoder, stream, head, values = found["place"].tolist()
    block = bytes(found["block"].tolist()).decode()
    return Place(linear, block, bool(decoder), bool(stream), found.get("gain"), head or None, ENDS[values])


def places(model: nn.Module, block: Block) -> dict[str, Place]:
    """The place of each linear of a block, by the linears' names, in the order of a forward pass."""
    head = getattr(getattr(block.module, "self_attn", None), "head_dim", None)
    decoder = not any(one.all_vision for one in block.passes)
    found: dict[str, Place] = {}
    for group in block.groups():
        norm: Any = None if group.norm is None else model.get_submodule(group.norm)
        for name, linear in group.linears.items():
            ends: Mapping[str, Literal["writes", "reads"]] = {"v_proj": "writes", "o_proj": "reads"}
            values = ends.get(name.rpartition(".")[2]) if head else None
            place = Place(linear, block.name, decoder, norm is not None, gain_of(norm), head, values)
            found[name] = place
    return found


@torch.no_grad()
def gain_of(norm: Any) -> Tensor | None:
    """What a norm multiplies its channels with, [D] float32; None for a norm with a bias, or without a gain.

    Some norms hold the gain less one (Gemma). Which it is shows in what becomes of a vector of ones.
    """
    weight = getattr(norm, "weight", None)
    if weight is None or getattr(norm, "bias", None) is not None:
        return None
    held = weight.detach().float()
    seen = norm(torch.ones(1, 1, len(weight), dtype=weight.dtype, device=weight.device))[0, 0].float()
    return min((held, held + 1), key=lambda gain: float((gain - seen).abs().sum()))
