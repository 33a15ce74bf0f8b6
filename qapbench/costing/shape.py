"""The shape of a model: its matrix products, the heads of its attention, and the size of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qapbench.models import Family

from .linear_attention import LinearAttention


@dataclass(frozen=True)
class Product:
    """A linear layer: y = x W^T.

    Attributes:
        name: its name in the model.
        part: the part of the model that a spec's `scope` calls it by; "head" for the one that makes logits.
        inward: width of x.
        outward: width of y.
        of_norm: whether x is what a norm gives, as in all linears of a layer's attention and MLP but their last.
        rows: rows of x for each token that passes its layer.
    """

    name: str
    part: str
    inward: int
    outward: int
    of_norm: bool = False
    rows: float = 1.0

    @property
    def flops(self) -> float:
        """FLOPs per token."""
        return 2 * self.inward * self.outward * self.rows


@dataclass(frozen=True)
class ModelShape:
    """What the cost of a model depends on. No weight is read, so the model may lie on the "meta" device.

    Attributes:
        family: the model.
        tower: linears of each layer of the vision tower.
        patch: FLOPs of embedding one patch.
        tower_width: width of the tower's queries, all heads together.
        tower_heads: number of the tower's heads.
        projector: linears of the projector.
        decoder: linears of each layer of the language model.
        linear: for each layer of the language model, its linear attention; None for one with keys and values.
        head: the linear that makes logits.
        width: width of the decoder's hidden states.
        heads: number of heads of the decoder's queries.
        key_heads: number of heads of its keys and values.
        head_width: width of a head.
        tensors: number of values and bytes per value of every stored tensor, by name. A tied one counts once.
        table: name of the embedding table.
    """

    family: Family
    tower: tuple[tuple[Product, ...], ...]
    patch: int
    tower_width: int
    tower_heads: int
    projector: tuple[Product, ...]
    decoder: tuple[tuple[Product, ...], ...]
    linear: tuple[LinearAttention | None, ...]
    head: Product
    width: int
    heads: int
    key_heads: int
    head_width: int
    tensors: Mapping[str, tuple[int, int]]
    table: str

    @property
    def depth(self) -> int:
        """Number of the decoder's layers."""
        return len(self.decoder)

    @property
    def value_bytes(self) -> int:
        """Bytes of a value of the model's dtype, which activations and the KV cache have too."""
        return torch.empty(0, dtype=self.family.model.dtype).element_size()

    @property
    def products(self) -> Iterator[Product]:
        """All linears that a spec can quantize."""
        yield from (product for layer in (*self.tower, *self.decoder) for product in layer)
        yield from self.projector


def shape_of(family: Family) -> ModelShape:
    """The shape of a model."""
    model = family.model
    names = {id(module): name for name, module in model.named_modules()}
    text, vision = model.config.get_text_config(), model.config.vision_config
    heads = text.num_attention_heads
    output = model.get_output_embeddings()

    def linears(root: nn.Module, part: str) -> tuple[Product, ...]:
        found = {names[id(module)]: module for module in root.modules() if isinstance(module, nn.Linear)}
        last: dict[str, str] = {}  # of each module that holds some; linear attention does not list it last
        for name in found:
            module = name.rpartition(".")[0]
            if not last.get(module, "").endswith(".out_proj"):
                last[module] = name
        layers = part != "projector"
        return tuple(
            _product(module, name, part, layers and name not in last.values(), family.rows_per_token(name))
            for name, module in found.items()
        )

    convolutions = [m for m in family.tower.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    return ModelShape(
        family=family,
        tower=tuple(linears(block, "vision") for block in family.blocks("vision")),
        patch=sum(2 * module.weight.numel() for module in convolutions),
        tower_width=vision.hidden_size,
        tower_heads=getattr(vision, "num_attention_heads", None) or vision.num_heads,
        projector=tuple(
            one for root in family.roots("projector") for one in (*linears(root, "projector"), *_matrices(root, names))
        ),
        decoder=tuple(linears(block, "language") for block in family.blocks("language")),
        linear=tuple(LinearAttention.of(text, index) for index in range(text.num_hidden_layers)),
        head=_product(output, names[id(output)], "head"),
        width=text.hidden_size,
        heads=heads,
        key_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_width=getattr(text, "head_dim", None) or text.hidden_size // heads,
        tensors=dict(_tensors(model)),
        table=f"{names[id(model.get_input_embeddings())]}.weight",
    )


def _matrices(root: nn.Module, names: Mapping[int, str]) -> Iterator[Product]:
    """Matrices [in, out] that a projector holds itself, not in a linear layer, as that of Gemma 3."""
    for name, value in root.named_parameters(recurse=False):
        if value.ndim == 2:
            yield Product(f"{names[id(root)]}.{name}", "projector", *value.shape)


def _product(linear: Any, name: str, part: str, of_norm: bool = False, rows: float = 1.0) -> Product:
    return Product(name, part, linear.in_features, linear.out_features, of_norm, rows)


def _tensors(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name, number of values and bytes per value of what a checkpoint of the model holds."""
    for name, value in model.named_parameters():  # a tied weight comes once
        yield name, (value.numel(), value.element_size())
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, (buffer.numel(), buffer.element_size())


def flops_of(products: Iterable[Product]) -> float:
    """FLOPs of some linears per token."""
    return sum(product.flops for product in products)
