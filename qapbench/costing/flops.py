"""The work of each stage: vision tower, projector, prefill of the language model, and one decoded token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qapbench.models.outline import ImageOutline

from .bits import Bits
from .shape import ModelShape, Product
from .work import Work, work


def products_work(products: Iterable[Product], tokens: float, bits: Bits) -> Work:
    """The work of some linears on so many tokens, with a method's own transforms at them, in 16 bits."""
    listed = list(products)
    own = sum(bits.online_flops(product) * product.rows for product in listed)
    parts = (work(product.flops * tokens, bits.of(product)) for product in listed)
    return Work.total([*parts, work(own * tokens)])


def tower_work(shape: ModelShape, outline: ImageOutline, layers: int, bits: Bits) -> Work:
    """The vision tower: 2 in out FLOPs per token of each linear, and 4 width s^2 of attention over s tokens.

    Args:
        shape: the model.
        outline: the images.
        layers: number of the tower's layers that run.
        bits: formats of the linears.
    """
    parts = [work(shape.patch * outline.patches)]
    for linears, lengths in zip(shape.tower[:layers], outline.attended, strict=False):
        parts.append(products_work(linears, sum(lengths), bits))
        parts.append(work(4 * shape.tower_width * sum(length**2 for length in lengths)))
    return Work.total(parts)


def projector_work(shape: ModelShape, tokens: float, bits: Bits) -> Work:
    """The projector, on so many tokens."""
    return products_work(shape.projector, tokens, bits)


def decoder_work(shape: ModelShape, new: Sequence[float], held: Sequence[float], bits: Bits, prefill: bool) -> Work:
    """The language model on new tokens, and the logits of the last one of them.

    In layer l, each of new[l] tokens takes 2 in out FLOPs in each linear, and 2 heads width held[l] in each of the two
    products of attention. Nothing is saved for what a causal mask hides, as in `torch.utils.flop_counter`. Linear
    attention takes what `LinearAttention` says.

    Args:
        shape: the model.
        new: for each layer, tokens that pass through it.
        held: for each layer, tokens that these attend to.
        bits: formats of the linears and of the cache.
        prefill: whether the new tokens are the prompt.
    """
    parts = [work(shape.head.flops)]
    keys, values = bits.attention(prefill)
    for linears, linear, passing, seen in zip(shape.decoder, shape.linear, new, held, strict=True):
        parts.append(products_work(linears, passing, bits))
        if linear is not None:
            parts.append(work(linear.prefill_flops(passing) if prefill else linear.step_flops * passing))
            continue
        attended = 2 * shape.heads * shape.head_width * passing * seen
        parts += [work(attended, keys), work(attended, values)]
    return Work.total(parts)


def activation_bytes(shape: ModelShape, outline: ImageOutline, columns: Sequence[float], batch: int) -> float:
    """Bytes of activations that are held at the same time at most, in the model's dtype.

    For each token of a layer: hidden states twice (the residual and what is normalised), the outputs of the widest
    linears, and what is made of them: 2 D + (n + 1) max(out), where n linears have the widest output. Attention is
    taken not to hold its matrix, and weights and KV cache are counted elsewhere.

    Args:
        shape: the model.
        outline: the images, all of which pass the tower together.
        columns: for each layer of the decoder, the tokens that it receives.
        batch: prompts side by side.
    """
    tower = max((sum(lengths) for lengths in outline.attended), default=0)
    held: list[float] = [tower * _per_token(layer, shape.tower_width) for layer in shape.tower[:1]]
    held += [count * _per_token(layer, shape.width) for layer, count in zip(shape.decoder, columns, strict=True)]
    return max(held) * batch * shape.value_bytes


def _per_token(layer: Sequence[Product], width: int) -> int:
    """Values per token that a layer holds at the same time."""
    widest = max(product.outward for product in layer)
    return 2 * width + widest * (1 + sum(product.outward == widest for product in layer))
