"""Outliers put into a Llama-like decoder by exact changes of basis: the same outputs, activations as in large models.

A model that was trained small has no outliers, so that 4 bits cost it little. Let h be the residual stream, of which
every RMSNorm with gains g makes x = g * h / rms(h), read by the linears behind it. Four steps leave each output as is:

1. The gains go into the readers: W <- W diag(g), g <- 1.
2. The stream is rotated: h <- h Q with an orthogonal Q, which changes no rms. Whatever writes to the stream is turned
   likewise (embeddings E <- E Q, W <- Q^T W, b <- b Q), and whatever reads it is turned back (W <- W Q).
3. For the channels C of a norm: g_c <- s, and W[:, c] <- W[:, c] / s in its readers.
4. Or for gated neurons C, down(act(gate x) * up x): up[c] <- s up[c], and down[:, c] <- down[:, c] / s.

Q makes channels of directions in which few tokens lie far out. These tokens then have a few values that are s times
larger than before, and a scale that a group shares with such a value is coarse. The strength s is all that changes
between two such models. Everything is computed in float64 in a fixed order, so that a recipe gives the same bytes on
every machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qapbench.errors import UserError

Place = Literal["norms", "neurons"]
"""Where outliers are put: at the outputs of the norms, or in gated neurons."""

READERS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
NORMS = ("input_layernorm", "post_attention_layernorm")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
UNKNOWN = ("pre_feedforward_layernorm", "post_feedforward_layernorm")  # norms of other decoders' layers (Gemma 2, 3)


@dataclass(frozen=True)
class Outliers:
    """Where the outliers of one model belong.

    Attributes:
        directions: [N, n, D] float64, for each of the decoder's N = 2 * layers norms n directions of the stream. All
            N * n are orthonormal.
        neurons: [layers, m] int64, gated neurons of each layer.
    """

    directions: Tensor
    neurons: Tensor


@dataclass(frozen=True)
class Layout:
    """Names of a decoder's weights in a state dict.

    Attributes:
        decoder: what the decoder's names begin with, such as "model.language_model.".
        head: name of the output head's weight.
        depth: number of layers.
        writer: name of the linear outside of the decoder that writes tokens to the stream, such as the projector's
            last; "" if there is none.
    """

    decoder: str
    head: str
    depth: int
    writer: str = ""


def layout_of(names: Sequence[str], writer: str = "") -> Layout:
    """Find the decoder in the names of a state dict.

    Args:
        names: names of all weights.
        writer: name of the linear outside of the decoder that writes tokens to the stream.

    Raises:
        UserError: there is no decoder that is built as Llama's.
    """
    first = "layers.0.input_layernorm.weight"
    decoders = [name.removesuffix(first) for name in names if name.endswith(first)]
    heads = [name for name in names if name.endswith("lm_head.weight")]
    if len(decoders) != 1 or len(heads) != 1:
        raise UserError(
            f"the model has {len(decoders)} decoders like Llama's and {len(heads)} heads; one of each is meant"
        )
    decoder, known = decoders[0], set(names)
    depth = len([name for name in names if name.startswith(decoder) and name.endswith(".input_layernorm.weight")])
    wanted = [f"{decoder}{name}" for name in ("embed_tokens.weight", "norm.weight")]
    for layer in range(depth):
        inner = (*NORMS, *READERS[0], *READERS[1], *WRITERS)
        wanted += [f"{decoder}layers.{layer}.{name}.weight" for name in inner]
    wanted += [f"{writer}.weight"] if writer else []
    if missing := [name for name in wanted if name not in known]:
        raise UserError(f"the decoder is not built as Llama's: it has no {missing[0]}")
    if other := [name for name in names if any(f".{norm}." in name for norm in UNKNOWN)]:
        raise UserError(f"the decoder is not built as Llama's: {other[0]} is a norm that Llama does not have")
    return Layout(decoder, heads[0], depth, writer)


def put_in(
    state: Mapping[str, Tensor], layout: Layout, outliers: Outliers, strength: float, place: Place = "norms"
) -> dict[str, Tensor]:
    """The weights of a model with outliers, in float64; the model computes what it computed before.

    Args:
        state: the weights, in which the head is no alias of the embeddings.
        layout: their names.
        outliers: where outliers belong.
        strength: factor s > 0 of the chosen channels; 1 changes the basis only.
        place: whether norms or gated neurons are scaled. The basis is changed in both cases.
    """
    new = {name: value.double() for name, value in state.items()}
    _gains_into_readers(new, layout)
    channels = _rotate(new, layout, outliers.directions)
    for layer in range(layout.depth):
        base = f"{layout.decoder}layers.{layer}."
        if place == "neurons":
            chosen = outliers.neurons[layer]
            _scale_rows(new, f"{base}mlp.up_proj", chosen, strength)
            new[f"{base}mlp.down_proj.weight"] = _divided(new[f"{base}mlp.down_proj.weight"], chosen, strength)
            continue
        for half, (norm, readers) in enumerate(zip(NORMS, READERS, strict=True)):
            chosen = channels[2 * layer + half]
            _scale_rows(new, base + norm, chosen, strength)
            for reader in readers:
                new[f"{base}{reader}.weight"] = _divided(new[f"{base}{reader}.weight"], chosen, strength)
    return new


def channels_of(directions: Tensor) -> Tensor:
    """The channels [N, n] that directions [N, n, D] become. Those of a norm are far apart, and share few groups."""
    norms, each, width = directions.shape
    step = width // (norms * each)
    return torch.arange(each) * (width // each) + torch.arange(norms)[:, None] * step + step // 2


def _gains_into_readers(new: dict[str, Tensor], layout: Layout) -> None:
    """Multiply the gains of each norm into the weights of its readers."""
    norms = {f"{layout.decoder}norm.weight": [layout.head]}
    for layer in range(layout.depth):
        base = f"{layout.decoder}layers.{layer}."
        for norm, readers in zip(NORMS, READERS, strict=True):
            norms[f"{base}{norm}.weight"] = [f"{base}{reader}.weight" for reader in readers]
    for norm, weights in norms.items():
        for weight in weights:
            new[weight] = new[weight] * new[norm]
        new[norm] = torch.ones_like(new[norm])


def _rotate(new: dict[str, Tensor], layout: Layout, directions: Tensor) -> Tensor:
    """Turn the residual stream so that directions [N, n, D] become channels; returns these channels [N, n]."""
    channels = channels_of(directions)
    mirrors = reflections(directions.flatten(0, 1), channels.flatten().tolist())
    layers = [f"{layout.decoder}layers.{layer}." for layer in range(layout.depth)]
    rows = [f"{layout.decoder}embed_tokens.weight", layout.head]
    rows += [f"{base}{reader}.weight" for base in layers for reader in (*READERS[0], *READERS[1])]
    writers = [f"{base}{writer}" for base in layers for writer in WRITERS] + ([layout.writer] if layout.writer else [])
    for name in rows:
        new[name] = turned(new[name], mirrors)
    for name in writers:
        new[f"{name}.weight"] = turned(new[f"{name}.weight"].T, mirrors).T.contiguous()
        if (bias := f"{name}.bias") in new:
            new[bias] = turned(new[bias][None], mirrors)[0]
    return channels


def reflections(directions: Tensor, channels: Sequence[int]) -> list[Tensor]:
    """Vectors v_j [D] of Householder reflections H_j = I - 2 v v^T / v^T v whose product maps direction j to channel j.

    A direction d becomes +e_c or -e_c, whichever is further away: what is subtracted is then never nearly equal.

    Args:
        directions: [n, D] float64, orthonormal.
        channels: n different channels.
    """
    found: list[Tensor] = []
    for direction, channel in zip(directions, channels, strict=True):
        mirror = turned(direction[None], found)[0]
        # Exactly zero, so that channels which are in place are left alone.
        mirror[list(channels[: len(found)])] = 0
        mirror[channel] += 1.0 if mirror[channel] >= 0 else -1.0
        found.append(mirror)
    return found


def turned(rows: Tensor, mirrors: Sequence[Tensor]) -> Tensor:
    """Rows [R, D] behind the reflections, one after the other."""
    rows = rows.clone()
    for mirror in mirrors:
        share = 2 * _sum(rows * mirror) / _sum(mirror * mirror)
        rows = rows - share[..., None] * mirror
    return rows


def _sum(values: Tensor) -> Tensor:
    """The sum over the last dimension, halved again and again: in the same order on every machine."""
    while (width := values.shape[-1]) > 1:
        half = width // 2
        rest = values[..., 2 * half :]
        values = values[..., :half] + values[..., half : 2 * half]
        if rest.shape[-1]:
            values = torch.cat([values, rest], dim=-1)
    return values[..., 0]


def _scale_rows(new: dict[str, Tensor], name: str, chosen: Tensor, strength: float) -> None:
    """Multiply the chosen outputs of a norm or a linear by the strength."""
    for key in (f"{name}.weight", f"{name}.bias"):
        if key in new:
            scaled = new[key].clone()
            scaled[chosen] *= strength
            new[key] = scaled


def _divided(weight: Tensor, chosen: Tensor, strength: float) -> Tensor:
    """The weight [O, I] with the chosen inputs divided by the strength."""
    weight = weight.clone()
    weight[:, chosen] /= strength
    return weight
